"""The commands of trainspec: what is printed."""

from __future__ import annotations

import json
from argparse import Namespace

from trainspec.checkpoints.command import run_checkpoint
from trainspec.data import open_dataset
from trainspec.errors import EXIT_DONE, UserError
from trainspec.imports.command import run_import
from trainspec.preview import preview
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import resolve
from trainspec.show import show


def run(args: Namespace) -> int:
    """Run one command; returns the exit code."""
    match args.command:
        case "checkpoint":
            return run_checkpoint(args)
        case "schema":
            print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
        case "show":
            show(load_recipe(args.recipe, args.overrides))
        case "import":
            run_import(args)
        case "data":
            if args.rows < 1:
                raise UserError(f"--rows {args.rows}: give 1 or more")
            recipe = load_recipe(args.recipe, args.overrides)
            dataset = open_dataset(resolve(recipe), args.split)
            # Each example once: a larger batch would begin the next epoch.
            preview(dataset, dataset.batch(0, min(args.rows, dataset.num_examples)))
            if args.split == "train":
                span = recipe.span(lambda: dataset.num_examples)
                print(
                    span.describe(examples=dataset.num_examples, global_examples=recipe.batch.global_examples)
                )
        case other:
            raise AssertionError(f"the parser let {other!r} through")
    return EXIT_DONE
