"""trainspec show: the resolved recipe, its model and length, what is trained, and what each device would hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import get_args

from trainspec.adapters import read_adapter
from trainspec.cost import cost_of
from trainspec.data import check_positions, open_dataset
from trainspec.errors import PlanError, UserError
from trainspec.hf import model_notes, read_model, resolve_model
from trainspec.loop import check_plan
from trainspec.methods import adapter_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param, param_table
from trainspec.plan import Backend
from trainspec.recipe import Recipe, idle_settings
from trainspec.report import describe


def show(recipe: Recipe) -> None:
    """Print what the recipe means.

    Raises UserError at the end, with the first of what would stop a run: the model has not the positions, its files or
    the adapter's cannot be read (only their headers are), the data that `run.epochs` counts have a mistake, or no
    backend runs the plan.
    """
    model, _ = resolve_model(recipe.model)
    trained = trainable_table(model, recipe.method)
    print(recipe.to_yaml(), end="")
    _say(describe(model, recipe.method, recipe.precision.policy))
    for line in grouped(trained):
        _say(f"  {line}")
    for note in model_notes(recipe.model):
        _say(note)
    checks = (
        lambda: check_positions(recipe, model),
        lambda: _check_files(recipe, model),
        lambda: _say_length(recipe),
        lambda: _say_plan(recipe, model),
    )
    problems = [problem for check in checks if (problem := _problem(check))]
    for problem in problems:
        _say(str(problem))
    if problems:
        raise problems[0]


def _say(text: str) -> None:
    # What stands behind the recipe is a comment of it.
    for line in text.splitlines():
        print(f"# {line}")


def _problem(check: Callable[[], None]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def grouped(rows: Iterable[Param]) -> list[str]:
    """Rows of the table by name, those of the layers together: `model.layers.{0..31}.mlp.up_proj.weight [...] x 32`."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for param in rows:
        name = re.sub(rf"\blayers\.{param.layer}\.", "layers.{}.", param.name, count=1)
        layers.setdefault((name, param.shape), []).append(-1 if param.layer is None else param.layer)
    return [
        f"{name.replace('{}', _ranges(numbers))} {list(shape)}"
        + (f" x {len(numbers)}" if len(numbers) > 1 else "")
        for (name, shape), numbers in layers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..31}`, `{0,2,4..7}`, or the only number."""
    cuts = [i for i, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *cuts, len(numbers)])]
    words = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return words[0] if len(numbers) == 1 else f"{{{','.join(words)}}}"


def _check_files(recipe: Recipe, model: ModelSpec) -> None:
    """Raises WeightsError where the files that training starts from are not there, damaged or another model's."""
    method, directory = recipe.method, resolve_model(recipe.model)[1]
    if recipe.model.weights == "pretrained" and directory is not None:
        read_model(directory, model, param_table(model), dtype=None)
    if method.start is not None:
        read_adapter(method.start, model, method, adapter_table(model, method), dtype="float32")


def _say_length(recipe: Recipe) -> None:
    """How long the run is; the data are read where that depends on them."""
    counted: list[int] = []

    def rows() -> int:
        counted.append(open_dataset(recipe, "train").rows)
        return counted[0]

    span = recipe.span(rows)
    warmup = recipe.schedule.warmup(span.steps)
    _say(span.said(rows=counted[0] if counted else None, examples=recipe.batch.global_examples))
    if warmup:
        _say(f"the rate warms up over {warmup} of {span.steps} updates")
    for line in idle_settings(recipe, span):
        _say(line)


def _say_plan(recipe: Recipe, model: ModelSpec) -> None:
    """What a device holds on each backend. Raises PlanError where neither runs the plan."""
    refusals: dict[Backend, str] = {}
    for backend in get_args(Backend):
        try:
            check_plan(recipe, backend)
            _say(f"{backend}: each of {recipe.plan.devices} devices holds {_held(recipe, model, backend)}")
        except PlanError as error:
            _say(f"{backend}: {error}")
            refusals[backend] = str(error)
    if len(refusals) == len(get_args(Backend)):
        told = set(refusals.values())
        each = "; ".join(f"{backend}: {line}" for backend, line in refusals.items())
        raise PlanError(f"no backend runs this plan: {told.pop() if len(told) == 1 else each}")


def _held(recipe: Recipe, model: ModelSpec, backend: Backend) -> str:
    """The training state on one device, in words."""
    held = cost_of(recipe, model, backend).held()
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in asdict(held).items())
    return f"{held.total / 2**20:,.1f} MiB of training state ({parts})"
