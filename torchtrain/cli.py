"""torchtrain train | eval | generate | export RECIPE: the same commands and flags as jaxtrain; and torchtrain convert DIR OUT."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from torchtrain.launch import report_to_launcher
from torchtrain.processes import is_leader
from trainspec.command import backend_parser, run_command
from trainspec.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED

PROGRAM = "torchtrain"
# How long a process that is not the leader waits before it says what is wrong. By then the leader has mostly said it and
# ended, which takes seconds on a busy machine with all of torch loaded, and their launcher has ended them all.
_FOLLOWER_DELAY_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns one of the exit codes that `trainspec.command` lists."""
    words = list(sys.argv[1:] if argv is None else argv)
    tell = report_to_launcher()
    parser = backend_parser(PROGRAM, converts=True)
    run = partial(run_command, is_program=argv is None, tell=tell)
    command = partial(run, lambda args: _run(args, words), parser, words)
    return command() if tell or is_leader() else _follow(command)


def _follow(command: Callable[[], int]) -> int:
    """Run `command` in a process that is not the leader: it speaks only if it fails, and late."""
    stderr, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(stderr):
            code = command()
        return code
    finally:  # also where the parser or a traceback ends the process
        if code not in (EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED) and stderr.getvalue():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever has started it need not wait
            time.sleep(_FOLLOWER_DELAY_SECONDS)
            sys.stderr.write(stderr.getvalue())


def _run(args: Namespace, words: Sequence[str]) -> None:
    # What --help does without.
    from torchtrain import commands

    commands.run(args, words)
