"""torchtrain train | eval | export RECIPE: the same commands and flags as jaxtrain."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

from torchtrain.launch import has_launcher, launch
from torchtrain.parallel import is_leader
from torchtrain.train import evaluate, train
from trainspec.command import backend_parser, out_directory, run_command, trace_request
from trainspec.export import export
from trainspec.loop import check_plan
from trainspec.recipe import load_recipe

PROGRAM = "torchtrain"
# A process that does not lead says what is wrong this much later: mostly the leader has said it by then, and whoever
# started them has ended them all.
_FOLLOWER_DELAY_SECONDS = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (training stopped itself) or 2 (the person's mistake)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = backend_parser(PROGRAM)
    if is_leader():
        return run_command(lambda args: _run(args, words), parser, words)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run_command(lambda args: _run(args, words), parser, words)
    if said.getvalue():
        time.sleep(_FOLLOWER_DELAY_SECONDS)
        sys.stderr.write(said.getvalue())
    return code


def _run(args: Namespace, words: Sequence[str]) -> int | None:
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, PROGRAM)
    processes = recipe.plan.devices
    if args.command != "export" and processes > 1 and not has_launcher(os.environ):
        check_plan(recipe, "torch")  # a mistake in the plan must not wait for its processes
        return launch(PROGRAM, words, processes=processes)
    match args.command:
        case "train":
            train(recipe, out=out, trace=trace_request(args), resume=args.resume)
        case "eval":
            loss, whose = evaluate(recipe, out=out)
            if is_leader():
                print(f"held-out loss {loss:.6f} of {whose}")
        case "export":
            print(f"wrote {export(recipe, out=out, merge=args.merge)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")
