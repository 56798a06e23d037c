"""The fp64 reference: every step of a recorded run repeated in float64, from that run's own weights.

    python -m parity.runs.replay JOB.json

A low-precision run drifts away from any other run, and Adam turns the noise of a near-zero gradient into a whole step,
so two trajectories say little about each other after a few updates. Here each step starts from the recorded run's
weights, so the difference is the rounding of that one step. The first run's steps are also repeated `draws` times from
weights perturbed by one rounding each (`parity.runs.perturb`). How far every tensor moves is stored as mean squares of
its rows and columns, which is all that a bound needs and takes little disk space.

JOB is a `parity.measure.Job`. The output is OUT/reference-0, OUT/reference-1, ... (traces without moments and updates)
and OUT/movement. It runs as its own program, which loads the backend by name.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from parity.measure import Job
from parity.runs.perturb import folded, perturbed
from trainspec.backends import BACKENDS
from trainspec.runs.checkpoint import Checkpoint
from trainspec.runs.contract import Backend, Metrics
from trainspec.data import open_dataset
from trainspec.errors import NonFiniteLossError, TraceError
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.plans.plan import Plan
from trainspec.recipe import ModelSource, load_recipe
from trainspec.runs.run import Run
from trainspec.schedule import learning_rate
from trainspec.trace import StepTrace, Trace, TraceWriter

Array = NDArray[Any]
Arrays = dict[str, Array]
GROUPS = ("gradient", "activation", "activation_gradient")


def weights_before(trace: Trace, names: set[str], *, computed: str) -> Iterator[Arrays]:
    """Float64 copies of the weights that updates 1, 2, ... compute with, read lazily.

    An update is a difference of two stored weights. Its sum with the weight is rounded to the stored type again, which
    undoes the rounding of that difference. A run computes with the stored weight rounded to `computed`.
    """
    stored = {name: trace.read_initial(f"weight/{name}") for name in sorted(names)}
    for record in trace.steps:
        yield {name: _rounded(weight, computed) for name, weight in stored.items()}
        for name, weight in stored.items():
            update = trace.read(record["step"], f"update/{name}").astype(np.float64)
            stored[name] = (weight.astype(np.float64) + update).astype(weight.dtype)


def _rounded(weight: Array, computed: str) -> Array:
    return weight.astype(computed).astype(np.float64)


class Replayer:
    """A backend in this process that trains the reference's recipe: float64, one device."""

    def __init__(self, job: Job) -> None:
        recipe = load_recipe(Path(job.recipe), job.overrides)
        self.recipe = recipe.model_copy(update={"plan": Plan(remat=recipe.plan.remat)})
        program = BACKENDS[job.backend].program
        self.run: Run = importlib.import_module(f"{program}.cluster").start(self.recipe)
        self.backend = cast(Backend[Any], importlib.import_module(f"{program}.step"))
        self.state: Any = None
        self.job = job
        self.dataset = open_dataset(self.run, "train")
        self.span = self.recipe.span(lambda: self.dataset.num_examples)
        self.trained = {p.name for p in self.run.trained}

    def steps(self, trace: Trace, *, draw: int | None) -> Iterator[tuple[int, Metrics]]:
        """(step, metrics) of every step of `trace`, from its weights or from perturbed ones."""
        # All states share the first one's compiled programs: their recipes differ only in the weights' directory.
        state = self.state = self.backend.init_state(self._with_weights_of(trace, draw), like=self.state)
        for step, weights in enumerate(weights_before(trace, self.trained, computed=self.job.computed), 1):
            if draw is not None:
                weights = {
                    name: perturbed(w, name, unit=self.job.unit, draw=draw, step=step)
                    for name, w in weights.items()
                }
            zeros = {name: np.zeros_like(weight) for name, weight in weights.items()}
            state = self.backend.restore(state, Checkpoint(step - 1, weights, zeros, zeros))
            keep = "activations" if step == self.job.activations_at else "gradients"
            try:
                state, metrics = self.backend.train_step(state, self.batch(step), lr=self.lr(step), keep=keep)
            except NonFiniteLossError:
                return
            yield step, metrics

    def batch(self, step: int) -> Any:
        """The recipe's batch at `step`, whatever the recorded run used."""
        return self.dataset.batch(step - 1, self.recipe.batch.global_examples)

    def lr(self, step: int) -> float:
        """The recipe's learning rate at `step`."""
        recipe = self.recipe
        return learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=step - 1, steps=self.span.steps)

    def _with_weights_of(self, trace: Trace, draw: int | None) -> Run:
        """The run on a model directory with the starting weights of `trace`."""
        directory = Path(self.job.out) / "weights"
        weights = ((p.name, self._starting(trace, p.name, draw)) for p in self.run.model_table)
        write_model(directory, weights, companions_from=self.run.directory, config=config_of(self.run.spec))
        source = ModelSource.model_validate({"from": str(directory)})
        return replace(self.run, recipe=self.recipe.model_copy(update={"model": source}), directory=directory)

    def _starting(self, trace: Trace, name: str, draw: int | None) -> Array:
        weight = _rounded(trace.read_initial(f"weight/{name}"), self.job.computed)
        if draw is None or name in self.trained:
            return weight
        return perturbed(weight, name, unit=self.job.unit, draw=draw, step=0)


def write_reference(replayer: Replayer, trace: Trace, out: Path) -> None:
    """Write every step of `trace`, repeated in float64, as a trace."""
    writer = TraceWriter(out)
    writer.initial({})
    for step, metrics in replayer.steps(trace, draw=None):
        writer.step(
            StepTrace(
                step, replayer.batch(step), metrics.loss_sum, metrics.tokens, metrics.grad_norm, replayer.lr(step),
                gradients=metrics.gradients or {}, updates={}, moment1={}, moment2={},
                activations=metrics.activations or {}, activation_gradients=metrics.activation_gradients or {},
            )
        )  # fmt: skip


def write_movement(replayer: Replayer, trace: Trace, reference: Trace, out: Path) -> None:
    """Write the movement of every tensor in every step: mean squares over all draws, by row and by column.

    A step that some draw does not reach, because its loss is not finite, is left out.
    """
    total: dict[int, Arrays] = {}
    made: Counter[int] = Counter()
    for draw in range(replayer.job.draws):
        for step, metrics in replayer.steps(trace, draw=draw):
            sums = total.setdefault(step, {})
            made[step] += 1
            for key, moved in _moved(metrics, reference, step):
                square = np.square(folded(moved)) / replayer.job.draws
                for axis, name in ((1, "rows"), (0, "columns")):
                    mean = square.mean(axis=axis)
                    sums[f"{key}/{name}"] = sums.get(f"{key}/{name}", np.zeros_like(mean)) + mean
    out.mkdir(parents=True, exist_ok=True)
    for step, sums in total.items():
        if made[step] == replayer.job.draws:
            save_file(sums, out / f"step-{step:06d}.safetensors")


def _moved(metrics: Metrics, reference: Trace, step: int) -> Iterator[tuple[str, Array]]:
    """(key, movement) of every tensor of a step, and of the mean loss."""
    yield "loss", np.asarray(metrics.loss_sum / metrics.tokens - reference.steps[step - 1]["loss"])
    groups = (metrics.gradients, metrics.activations, metrics.activation_gradients)
    for group, arrays in zip(GROUPS, groups, strict=True):
        for name, array in (arrays or {}).items():
            yield f"{group}/{name}", array - reference.read(step, f"{group}/{name}")


def main() -> None:
    """Run the job in the file named on the command line."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    replayer, out = Replayer(job), Path(job.out)
    for number, run in enumerate(job.runs):
        write_reference(replayer, Trace(Path(run)), out / f"reference-{number}")
    if job.draws:
        try:
            reference = Trace(out / "reference-0")
        except TraceError:  # not even the first step has a finite loss
            return
        write_movement(replayer, Trace(Path(job.runs[0])), reference, out / "movement")


if __name__ == "__main__":
    main()
