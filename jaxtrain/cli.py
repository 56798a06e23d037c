"""jaxtrain train | eval | export RECIPE: the same commands and flags as torchtrain."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from jaxtrain.cluster import is_leader
from jaxtrain.train import evaluate, train
from trainspec.backends import BACKENDS
from trainspec.command import backend_parser, out_directory, run_command, train_request
from trainspec.recipe import load_recipe
from trainspec.runs.export import export

PROGRAM = BACKENDS["jax"].program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is one of those that `trainspec.command` lists."""
    return run_command(_run, backend_parser(PROGRAM), argv)


def _run(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, PROGRAM)
    match args.command:
        case "train":
            train(recipe, train_request(args, out))
        case "eval":
            loss, whose = evaluate(recipe, out=out)
            if is_leader():
                print(f"held-out loss {loss:.6f} of {whose}")
        case "export":
            # Needs only files: the leader does it alone, and waits for no other process.
            if is_leader():
                print(f"wrote {export(recipe, out=out, merge=args.merge, dtype=args.dtype)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")
