"""torchtrain train | eval | export RECIPE: the same commands and flags as jaxtrain."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from torchtrain.launch import count_processes, has_launcher, launch, report_to_launcher
from torchtrain.parallel import check_accelerators, describe_devices, is_leader
from torchtrain.train import evaluate, train
from trainspec.backends import BACKENDS
from trainspec.command import allowed, backend_parser, out_directory, run_command, trace_request
from trainspec.errors import EXIT_DONE, EXIT_INTERRUPTED
from trainspec.export import export
from trainspec.failures import explained
from trainspec.recipe import load_recipe
from trainspec.run import resolve_on

NAME = "torch"
PROGRAM = BACKENDS[NAME].program
# A process that does not lead says what is wrong this much later: mostly the leader has said it by then, has ended
# (with all of torch loaded that alone takes seconds on a busy machine), and whoever started them has ended them all.
_FOLLOWER_DELAY_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is one of those that `trainspec.command` lists."""
    words = list(sys.argv[1:] if argv is None else argv)
    tell = report_to_launcher()
    command = partial(run_command, lambda args: _run(args, words), backend_parser(PROGRAM), words, tell=tell)
    return command() if tell or is_leader() else _follow(command)


def _follow(command: Callable[[], int]) -> int:
    """`command` in a process that does not lead: it has something to say only where it failed."""
    said, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            code = command()
        return code
    finally:  # also where the parser or a traceback ends the process
        if code not in (EXIT_DONE, EXIT_INTERRUPTED) and said.getvalue():
            time.sleep(_FOLLOWER_DELAY_SECONDS)
            sys.stderr.write(said.getvalue())


def _run(args: Namespace, words: Sequence[str]) -> None:
    count_processes(os.environ)  # refuses what no launcher would have said
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, PROGRAM)
    trace = trace_request(args) if args.command == "train" else None
    allow = allowed(args) if args.command == "train" else ()
    processes = recipe.plan.devices
    if args.command != "export" and processes > 1 and not has_launcher(os.environ):
        # A mistake in the plan must not wait for its processes.
        resolve_on(recipe, BACKENDS[NAME])
        check_accelerators()
        saving = out if args.command == "train" else None
        with explained(recipe, partial(describe_devices, recipe.plan), out=saving):
            launch(PROGRAM, words, processes=processes, logs=out / "logs")
        return
    match args.command:
        case "train":
            train(recipe, out=out, trace=trace, resume=args.resume, allow=allow)
        case "eval":
            loss, whose = evaluate(recipe, out=out)
            if is_leader():
                print(f"held-out loss {loss:.6f} of {whose}")
        case "export":
            if is_leader():
                print(f"wrote {export(recipe, out=out, merge=args.merge, dtype=args.dtype)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")
