"""trainspec show | data | schema: what a recipe means, before anything is trained."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import get_args

import numpy as np

from trainspec.command import add_recipe, run_command
from trainspec.cost import cost_of
from trainspec.data import IGNORED, Batch, Dataset, open_dataset
from trainspec.errors import PlanError
from trainspec.hf import resolve_model
from trainspec.loop import check_plan
from trainspec.methods import trainable_table
from trainspec.model import ModelSpec
from trainspec.plan import Backend
from trainspec.recipe import Recipe, load_recipe
from trainspec.report import describe

GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """What the command line takes."""
    parser = ArgumentParser(prog="trainspec", description="What a recipe means, before anything is trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="the resolved recipe, the model and what is trained")
    add_recipe(show)
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
            _show(load_recipe(args.recipe, args.overrides))
        case "data":
            recipe = load_recipe(args.recipe, args.overrides)
            dataset = open_dataset(recipe, args.split)
            print(dataset.summary)
            _preview(dataset, dataset.batch(0, args.rows))


def _show(recipe: Recipe) -> None:
    model, _ = resolve_model(recipe.model)
    rows = trainable_table(model, recipe.method)
    print(recipe.to_yaml(), end="")
    print(f"# {describe(model, recipe.method, recipe.precision.policy)}")
    for param in rows:
        print(f"#   {param.name} {list(param.shape)}")
    for backend in get_args(Backend):
        try:
            check_plan(recipe, backend)
            print(f"# {backend}: each of {recipe.plan.devices} devices holds {_held(recipe, model, backend)}")
        except PlanError as error:
            print(f"# {backend}: {error}")


def _held(recipe: Recipe, model: ModelSpec, backend: Backend) -> str:
    """The training state on one device, in words."""
    held = cost_of(recipe, model, backend).held()
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in asdict(held).items())
    return f"{held.total / 2**20:,.1f} MiB of training state ({parts})"


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
