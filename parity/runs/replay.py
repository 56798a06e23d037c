"""The fp64 reference: every step of a recorded run repeated in float64, from that run's own weights.

    python -m parity.runs.replay JOB.json

A low-precision run drifts away from any other run, and Adam turns the noise of a near-zero gradient into a whole step,
so two trajectories say little about each other after a few updates. Here each step starts from the recorded run's
weights, so the difference is the rounding of that one step. The first run's steps are also repeated `draws` times with
every result and every cotangent rounded as the run rounds them (`trainspec.step.Reference.gradients_of`). How far every tensor
moves is stored as mean squares of its rows, columns and elements.

JOB is a `parity.runs.job.Job`. The output is OUT/reference-0, OUT/reference-1, ... (traces without moments and updates)
and OUT/movement. It runs as its own program, which loads the backend by name.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from parity.comparison.pair import NAMES
from parity.comparison.tolerance import component_along
from parity.runs.job import Job
from parity.runs.roundings import folded
from trainspec.backends import BACKENDS
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.data import Batch, open_dataset
from trainspec.errors import NonFiniteLossError
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.plans.plan import Plan
from trainspec.recipe import ModelSource, load_recipe
from trainspec.runs.run import Run
from trainspec.schedule import learning_rate
from trainspec.step import RMS_ROUNDING, Metrics, Reference, Roundings
from trainspec.trace import STOPPED_FILE, Keep, StepTrace, Trace, TraceWriter

Array = NDArray[Any]
Arrays = dict[str, Array]
Record = dict[str, Any]
# How often a trace that grows is looked at.
POLL_SECONDS = 0.1
# The fields of `Metrics` by the names of their groups in a trace.
GROUPS = {
    "gradient": "gradients",
    "activation": "activations",
    "activation_gradient": "activation_gradients",
}


def weights_before(
    trace: Trace, names: set[str], *, computed: str, records: Iterable[Record] | None = None
) -> Iterator[Arrays]:
    """Float64 copies of the weights that updates 1, 2, ... compute with, read lazily; a step that was stopped included.

    An update is a difference of two stored weights. Its sum with the weight is rounded to the stored type again, which
    undoes the rounding of that difference. A run computes with the stored weight rounded to `computed`. `records` are those
    of a trace that still grows.
    """
    stored = {name: trace.read_initial(f"weight/{name}") for name in sorted(names)}
    for record in trace.steps if records is None else records:
        yield {name: _rounded(weight, computed) for name, weight in stored.items()}
        for name, weight in stored.items():
            update = trace.read(record["step"], f"update/{name}").astype(np.float64)
            stored[name] = (weight.astype(np.float64) + update).astype(weight.dtype)
    if Trace(trace.directory).stopped:  # a trace that grew may have got one since it was opened
        yield {name: _rounded(weight, computed) for name, weight in stored.items()}


def _rounded(weight: Array, computed: str) -> Array:
    return weight.astype(computed).astype(np.float64)


def records_of(trace: Path, ended: Path | None) -> Iterator[Record]:
    """The lines of trace.jsonl as they are written, until the file `ended` is there; None: it is whole."""
    file, count = trace / "trace.jsonl", 0
    while True:
        is_whole = (
            ended is None or ended.exists()
        )  # before the lines are read: what is written after it is of no run
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        yield from map(json.loads, whole[count:])
        count = len(whole)
        if is_whole:
            return
        time.sleep(POLL_SECONDS)


class Replayer:
    """A backend in this process that trains the reference's recipe: float64, one device.

    It uses the compiled programs of `like`, whose recipe differs from this one's in weights and data alone.
    """

    def __init__(self, job: Job, like: Replayer | None = None) -> None:
        recipe = load_recipe(Path(job.recipe), job.overrides)
        plan = Plan(remat=recipe.plan.remat, attention=recipe.plan.attention)
        self.recipe = recipe.model_copy(update={"plan": plan})
        program = BACKENDS[job.backend].program
        self.run: Run = importlib.import_module(f"{program}.cluster").start(self.recipe)
        self.backend = cast(Reference[Any], importlib.import_module(f"{program}.step"))
        self.roundings = Roundings(*(size * RMS_ROUNDING for size in job.units))
        self.state: Any = like.state if like else None
        self.job = job
        self.dataset = open_dataset(self.run, "train")
        self.span = self.recipe.span(lambda: self.dataset.num_examples)
        self.trained = {p.name for p in self.run.trained}

    def steps(
        self, trace: Trace, *, draws: int, records: Iterable[Record] | None = None
    ) -> Iterator[tuple[int, Batch, Metrics, Iterator[Metrics] | None]]:
        """(step, batch, metrics, those of each draw) of every step of `trace`, to the first that is not finite.

        That has None for its draws.
        """
        # All states share the first one's compiled programs: their recipes differ only in the weights' directory.
        state = self.state = self.backend.init_state(self._with_weights_of(trace), like=self.state)
        weights_of_steps = weights_before(trace, self.trained, computed=self.job.computed, records=records)
        for step, weights in enumerate(weights_of_steps, 1):
            zeros = {name: np.zeros_like(weight) for name, weight in weights.items()}
            state = self.backend.restore(state, Checkpoint(step - 1, weights, zeros, zeros))
            # The recipe's batch, whatever the recorded run used.
            batch = self.dataset.batch(step - 1, self.recipe.batch.global_examples)
            keep: Keep = "activations" if self.job.activations_at in (step, "all") else "gradients"
            gradients = partial(self.backend.gradients_of, state, batch, keep=keep)
            try:
                metrics = gradients()
            except NonFiniteLossError as error:
                yield step, batch, error.metrics, None
                return
            drawn = (gradients(roundings=self.roundings, draw=draw) for draw in range(draws))
            yield step, batch, metrics, drawn

    def lr(self, step: int) -> float:
        """The recipe's learning rate at `step`."""
        recipe = self.recipe
        return learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=step - 1, steps=self.span.steps)

    def _with_weights_of(self, trace: Trace) -> Run:
        """The run on a model directory with the starting weights of `trace`."""
        directory = Path(self.job.out) / "weights"
        weights = (
            (p.name, _rounded(trace.read_initial(f"weight/{p.name}"), self.job.computed))
            for p in self.run.model_table
        )
        write_model(directory, weights, companions_from=self.run.directory, config=config_of(self.run.spec))
        source = ModelSource.model_validate({"from": str(directory)})
        return replace(self.run, recipe=self.recipe.model_copy(update={"model": source}), directory=directory)


def write_reference(
    replayer: Replayer,
    trace: Trace,
    out: Path,
    *,
    movement: Path | None = None,
    records: Iterable[Record] | None = None,
    name: str = "",
) -> None:
    """Write every step of `trace`, repeated in float64, as a trace. `name` is the side's, for the lines that it prints.

    With `movement` that of every tensor is written there: mean squares over all draws. A step that some draw does not
    reach, because its loss is not finite, is left out of it.
    """
    writer = TraceWriter(out)
    writer.initial({})
    if movement:
        movement.mkdir(parents=True, exist_ok=True)
    draws = replayer.job.draws if movement else 0
    for step, batch, metrics, drawn in replayer.steps(trace, draws=draws, records=records):
        _say(f"reference of {name}: step {step}")
        record = StepTrace(
            step, batch, metrics.loss_sum, metrics.tokens, metrics.grad_norm, replayer.lr(step),
            gradients=metrics.gradients or {}, updates={}, moment1={}, moment2={},
            activations=metrics.activations or {}, activation_gradients=metrics.activation_gradients or {},
        )  # fmt: skip
        if drawn is None:
            writer.stopped(record)
            return
        writer.step(record)
        if movement:
            try:
                squares = mean_squares(metrics, _said(drawn, f"reference of {name}: step {step}"), draws)
            except NonFiniteLossError:
                continue
            save_file(squares, movement / f"step-{step:06d}.safetensors")


def _said(drawn: Iterator[Metrics], line: str) -> Iterator[Metrics]:
    """The draws, each told of on stdout, where `parity.runs.progress` reads it."""
    for number, metrics in enumerate(drawn, 1):
        _say(f"{line}, draw {number}")
        yield metrics


def _say(line: str) -> None:
    print(line, flush=True)


def mean_squares(reference: Metrics, drawn: Iterator[Metrics], draws: int) -> Arrays:
    """Mean squares of every tensor's movement over all draws, by row, by column and by element, and along the tensor itself."""
    sums: Arrays = {}
    for metrics in drawn:
        for key, before, moved in _moved(metrics, reference):
            square = np.square(folded(moved)) / draws
            means = {
                "rows": square.mean(axis=1),
                "columns": square.mean(axis=0),
                "elements": square.astype(np.float32),
                "along": np.square(component_along(moved, before))[None] / draws,
            }
            for name, mean in means.items():
                sums[f"{key}/{name}"] = sums.get(f"{key}/{name}", 0.0) + mean
    return sums


def _moved(metrics: Metrics, reference: Metrics) -> Iterator[tuple[str, Array, Array]]:
    """(key, value, its movement) of every tensor of a step, and of the mean loss."""
    losses = [np.asarray(each.loss_sum / each.tokens) for each in (metrics, reference)]
    yield "loss", losses[1], losses[0] - losses[1]
    for group, field in GROUPS.items():
        before: Arrays = getattr(reference, field) or {}
        for name, array in (getattr(metrics, field) or {}).items():
            yield f"{group}/{name}", before[name], array - before[name]


def main() -> None:
    """Run the job in the file named on the command line."""
    replay(Path(sys.argv[1]))


def replay(file: Path, *, like: Replayer | None = None) -> Replayer:
    """Run the job in `file`; `like` is the replayer of an earlier one, whose compiled programs are used."""
    job = Job(**json.loads(file.read_text(encoding="utf-8")))
    replayer, out = Replayer(job, like), Path(job.out)
    for number, run in enumerate(map(Path, job.runs)):
        ended = Path(job.ended[number]) if job.ended else None
        movement = out / "movement" if job.draws and number == 0 else None
        records = records_of(run, ended)
        made = list(islice(records, 1))  # waits for it
        if not made and not (run / STOPPED_FILE).is_file():
            continue  # the run made no update, and was not stopped at one
        write_reference(
            replayer, Trace(run), out / f"reference-{number}", movement=movement, records=chain(made, records),
            name=NAMES[number] if number < len(NAMES) else str(number),
        )  # fmt: skip
    return replayer


if __name__ == "__main__":
    main()
