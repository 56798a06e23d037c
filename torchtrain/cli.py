"""torchtrain train | eval | export RECIPE: the same commands and flags as jaxtrain; and torchtrain convert DIR OUT."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torchtrain.cluster import (
    check_accelerators,
    count_processes,
    describe_devices,
    has_launcher,
    is_leader,
)
from torchtrain.convert import convert
from torchtrain.launch import launch, report_to_launcher
from torchtrain.train import evaluate, train
from trainspec.backends import BACKENDS
from trainspec.command import backend_parser, out_directory, run_command, train_request
from trainspec.errors import EXIT_DONE, EXIT_INTERRUPTED
from trainspec.failures import explained
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.export import export
from trainspec.runs.request import TrainRequest
from trainspec.runs.run import resolve_on

PROGRAM = BACKENDS["torch"].program
# How long a process that is not the leader waits before it says what is wrong. By then the leader has mostly said it and
# ended, which takes seconds on a busy machine with all of torch loaded, and their launcher has ended them all.
_FOLLOWER_DELAY_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns one of the exit codes that `trainspec.command` lists."""
    words = list(sys.argv[1:] if argv is None else argv)
    tell = report_to_launcher()
    parser = backend_parser(PROGRAM, converts=True)
    command = partial(run_command, lambda args: _run(args, words), parser, words, tell=tell)
    return command() if tell or is_leader() else _follow(command)


def _follow(command: Callable[[], int]) -> int:
    """Run `command` in a process that is not the leader: it speaks only if it fails, and late."""
    stderr, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(stderr):
            code = command()
        return code
    finally:  # also where the parser or a traceback ends the process
        if code not in (EXIT_DONE, EXIT_INTERRUPTED) and stderr.getvalue():
            time.sleep(_FOLLOWER_DELAY_SECONDS)
            sys.stderr.write(stderr.getvalue())


def _launch(recipe: Recipe, words: Sequence[str], out: Path, *, trains: bool) -> None:
    """Run the same command in a process for each device, after what can be checked without them."""
    resolve_on(recipe, BACKENDS["torch"])
    check_accelerators()
    with explained(recipe, partial(describe_devices, recipe.plan), out=out if trains else None):
        launch(PROGRAM, words, processes=recipe.plan.devices, logs=out / "logs")


def _run(args: Namespace, words: Sequence[str]) -> None:
    count_processes(os.environ)  # raises for an environment that is no launcher's
    if args.command == "convert":
        if is_leader():
            print(f"wrote {convert(args.directory, args.out)}")
        return
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, PROGRAM)
    request = train_request(args, out) if args.command == "train" else TrainRequest(out)
    if args.command != "export" and recipe.plan.devices > 1 and not has_launcher(os.environ):
        return _launch(recipe, words, out, trains=args.command == "train")
    match args.command:
        case "train":
            train(recipe, request)
        case "eval":
            loss, whose = evaluate(recipe, out=out)
            if is_leader():
                print(f"held-out loss {loss:.6f} of {whose}")
        case "export":
            if is_leader():
                print(f"wrote {export(recipe, out=out, merge=args.merge, dtype=args.dtype)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")
