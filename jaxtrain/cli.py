"""jaxtrain train | eval | export RECIPE: the same commands and flags as torchtrain."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from jaxtrain.train import evaluate, train
from trainspec.command import backend_parser, out_directory, run_command, trace_request
from trainspec.export import export
from trainspec.recipe import load_recipe

PROGRAM = "jaxtrain"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, backend_parser(PROGRAM), argv)


def _run(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, PROGRAM)
    match args.command:
        case "train":
            train(recipe, out=out, trace=trace_request(args), resume=args.resume)
        case "eval":
            print(f"held-out loss {evaluate(recipe, out=out):.6f}")
        case "export":
            print(f"wrote {export(recipe, out=out, merge=args.merge)}")
