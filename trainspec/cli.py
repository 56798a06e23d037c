"""trainspec show | data | schema: what a recipe means, before anything is trained."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from trainspec.command import add_recipe, run_command
from trainspec.data import IGNORED, Batch, Dataset, open_dataset
from trainspec.recipe import Recipe, load_recipe
from trainspec.show import show

GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """What the command line takes."""
    parser = ArgumentParser(prog="trainspec", description="What a recipe means, before anything is trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser("show", help="the resolved recipe, the model and what is trained")
    add_recipe(shown)
    data = commands.add_parser("data", help="decoded batches, with what the loss is taken on visibly apart")
    add_recipe(data)
    data.add_argument("--split", choices=("train", "heldout"), default="train")
    data.add_argument("--rows", type=int, default=4, help="how many rows to show (4)")
    schema = commands.add_parser("schema", help="the JSON schema of a recipe")
    schema.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="not needed: every recipe has the same schema"
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
            dataset = open_dataset(recipe, args.split)
            print(dataset.summary)
            _preview(dataset, dataset.batch(0, args.rows))


def _preview(dataset: Dataset, batch: Batch) -> None:
    colour = sys.stdout.isatty()
    for i in range(len(batch.input_ids)):
        segments, targets = batch.segments[i], batch.labels[i] != IGNORED
        print(
            f"row {i}: {segments.size} tokens, {int((segments == 0).sum())} of padding, "
            f"{segments.max()} document(s), loss on {int(targets.sum())}"
        )
        for number in range(1, int(segments.max()) + 1):
            print(f"  document {number}")
            for counts, text in _stretches(dataset, batch, i, number):
                mark, shade = ("target", GREEN) if counts else ("masked", DIM)
                print(f"    {mark} {shade}{text!r}{PLAIN}" if colour else f"    {mark} {text!r}")


def _stretches(dataset: Dataset, batch: Batch, row: int, number: int) -> Iterator[tuple[bool, str]]:
    """Consecutive tokens of a document that do or do not count, as text."""
    at = np.flatnonzero(batch.segments[row] == number)
    targets = batch.labels[row, at] != IGNORED
    starts = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(at)]
    for start, stop in pairwise(starts):
        yield bool(targets[start]), dataset.decode(batch.input_ids[row, at[start:stop]])
