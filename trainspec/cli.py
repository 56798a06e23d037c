"""trainspec show | data | schema: what a recipe means, before anything is trained."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from trainspec.command import add_recipe, run_command
from trainspec.data import open_dataset
from trainspec.preview import preview
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import resolve
from trainspec.show import show


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """The command line of `trainspec`."""
    parser = ArgumentParser(prog="trainspec", description="What a recipe means, before anything is trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser("show", help="the resolved recipe, the model and what is trained")
    add_recipe(shown)
    data = commands.add_parser("data", help="records and examples as tokens, target tokens marked")
    add_recipe(data)
    data.add_argument("--split", choices=("train", "heldout"), default="train")
    data.add_argument("--rows", type=int, default=4, help="how many examples to show (4)")
    schema = commands.add_parser("schema", help="the JSON schema of a recipe")
    schema.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="ignored: every recipe has the same schema"
    )
    return parser


def _run(args: Namespace) -> None:
    match args.command:
        case "schema":
            print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
        case "show":
            show(load_recipe(args.recipe, args.overrides))
        case "data":
            recipe = load_recipe(args.recipe, args.overrides)
            dataset = open_dataset(resolve(recipe), args.split)
            preview(dataset, dataset.batch(0, args.rows))
            if args.split == "train":
                span = recipe.span(lambda: dataset.num_examples)
                print(
                    span.describe(examples=dataset.num_examples, global_examples=recipe.batch.global_examples)
                )
