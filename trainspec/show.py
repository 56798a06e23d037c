"""trainspec show: the resolved recipe, its model and length, the trained weights, and the memory of each device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise

from trainspec.backends import BACKENDS
from trainspec.data import check_positions, open_dataset
from trainspec.errors import PlanError, UserError
from trainspec.files.adapters import read_adapter
from trainspec.files.hf import model_notes, read_model
from trainspec.params import Param
from trainspec.plans.capabilities import Capabilities
from trainspec.recipe import Recipe, idle_settings
from trainspec.runs.opening import describe, loss_in_words
from trainspec.runs.run import Run, check_plan, cost_of, resolve


def show(recipe: Recipe) -> None:
    """Print what the recipe means.

    Raises UserError at the end, for the first thing that would stop a run: too few positions in the model, unreadable
    model or adapter files (only their headers are read), bad data where `run.epochs` has to count them, or a plan that no
    backend runs.
    """
    run = resolve(recipe)
    print(recipe.to_yaml(), end="")
    _say(describe(run))
    for line in group_entries(run.trained):
        _say(f"  {line}")
    for note in model_notes(recipe.model, run.spec, run.directory):
        _say(note)
    checks = (
        lambda: check_positions(recipe, run.spec),
        lambda: _check_files(run),
        lambda: _say_length(run),
        lambda: _say_plan(run),
    )
    problems = [problem for check in checks if (problem := _problem(check))]
    for problem in problems:
        _say(str(problem))
    if problems:
        raise problems[0]


def _say(text: str) -> None:
    # Written as YAML comments, so that the output as a whole is still the recipe.
    for line in text.splitlines():
        print(f"# {line}")


def _problem(check: Callable[[], None]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def group_entries(entries: Iterable[Param]) -> list[str]:
    """Entries of the table, one line for all layers: `model.layers.{0..31}.MODULE.weight [...] x 32`."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for param in entries:
        name = re.sub(rf"\blayers\.{param.layer}\.", "layers.{}.", param.name, count=1)
        layers.setdefault((name, param.shape), []).append(-1 if param.layer is None else param.layer)
    return [
        f"{name.replace('{}', _ranges(numbers))} {list(shape)}"
        + (f" x {len(numbers)}" if len(numbers) > 1 else "")
        for (name, shape), numbers in layers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..31}`, `{0,2,4..7}`, or a single number by itself."""
    cuts = [i for i, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *cuts, len(numbers)])]
    words = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return words[0] if len(numbers) == 1 else f"{{{','.join(words)}}}"


def _check_files(run: Run) -> None:
    """Raises WeightsError where the files that training starts from are missing, damaged or another model's."""
    method = run.recipe.method
    if run.recipe.model.weights == "pretrained" and run.directory is not None:
        read_model(run.directory, run.spec, run.model_table, dtype=None)
    if method.start is not None:
        read_adapter(method.start, run.spec, method, run.method_table, dtype="float32")


def _say_length(run: Run) -> None:
    """How long the run is. Reads the data only where the length depends on them."""
    recipe, counted = run.recipe, list[int]()

    def count_examples() -> int:
        counted.append(open_dataset(run, "train").num_examples)
        return counted[0]

    span = recipe.span(count_examples)
    warmup = recipe.schedule.warmup(span.steps)
    _say(
        span.describe(examples=counted[0] if counted else None, global_examples=recipe.batch.global_examples)
    )
    if warmup:
        _say(f"the rate warms up over {warmup} of {span.steps} updates")
    for line in idle_settings(recipe, span):
        _say(line)


def _say_plan(run: Run) -> None:
    """The memory of a device on each backend. Raises PlanError where none runs the plan."""
    _say(loss_in_words(run))
    refusals: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        try:
            check_plan(run, backend)
            _say(f"{name}: each of {run.recipe.plan.devices} devices holds {_memory_use(run, backend)}")
        except PlanError as error:
            _say(f"{name}: {error}")
            refusals[name] = str(error)
    if len(refusals) == len(BACKENDS):
        told = set(refusals.values())
        each = "; ".join(f"{backend}: {line}" for backend, line in refusals.items())
        raise PlanError(f"no backend runs this plan: {told.pop() if len(told) == 1 else each}")


def _memory_use(run: Run, backend: Capabilities) -> str:
    """The training state on one device, in words."""
    use = cost_of(run, backend).memory_use()
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in asdict(use).items())
    return f"{use.total / 2**20:,.1f} MiB of training state ({parts})"
