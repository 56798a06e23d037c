"""Runs `parity.runs.replay` for the two sides of a check, and makes bounds from its output."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from parity.comparison.adam import AdamRule
from parity.comparison.drift import lora_scale
from parity.comparison.estimated_bounds import EstimatedBounds
from parity.comparison.measured_bounds import MeasuredBounds, Measurement, Summation
from parity.comparison.pair import Pair
from parity.comparison.tolerance import UNIT, Bounds
from parity.runs.devices import REFERENCE_BACKEND
from parity.runs.job import Job
from parity.runs.programs import Launcher
from parity.runs.roundings import DRAWS
from parity.runs.work import REFERENCE
from trainspec.errors import EXIT_DONE, UserError
from trainspec.plans.names import DeviceKind
from trainspec.plans.plan import COMPUTE_DTYPE
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import Run, resolve
from trainspec.trace import Trace

Low = Literal["fp32", "bf16"]
ESTIMATED = "the bounds are estimated, not measured: the runs do not start from the recipe's weights, or train other ones"


@dataclass(frozen=True)
class ReplaySettings:
    """What is repeated in float64: runs of a recipe in a precision. What is found is under `out`/measured.

    Step `activations_at`, or `all`, is recorded with activations.
    """

    recipe: Path
    overrides: Sequence[str]
    precision: Low
    out: Path
    activations_at: int | Literal["all"] | None = None


class Replay:
    """The float64 reference of `runs`: a program that repeats every step, the first run's with draws.

    With `follows` it may start before the runs do, and repeats each step once it is recorded; `tell_ended` says that a
    run has ended.
    """

    def __init__(self, runs: Sequence[Path], settings: ReplaySettings, *, follows: bool = False) -> None:
        recipe, overrides, precision = settings.recipe, settings.overrides, settings.precision
        self.settings = settings
        self._home, self._runs, self._draws = settings.out / "measured", runs, DRAWS[precision]
        self._failure: str | None = None
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(parents=True)
        self._ended = [self._home / f"ended-{number}" for number in range(len(runs))] if follows else []
        # A fused kernel is held to the definition.
        exact = [
            *overrides, "precision.policy=fp64", "precision.reduce=fp64", "plan.attention=reference",
        ]  # fmt: skip
        job = Job(
            REFERENCE_BACKEND,
            str(recipe),
            exact,
            COMPUTE_DTYPE[precision],
            (
                UNIT[precision],
                UNIT["fp32"],
                UNIT[load_recipe(recipe, overrides).precision.reduce if precision == "bf16" else "fp32"],
            ),
            self._draws,
            settings.activations_at,
            [str(r) for r in runs],
            str(self._home),
            [str(file) for file in self._ended],
        )
        self.job_file.write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")

    @property
    def job_file(self) -> Path:
        """What `parity.runs.replay` is to do."""
        return self._home / "job.json"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self._home / "log.txt"

    def run(self, launcher: Launcher, device: DeviceKind = "cpu") -> None:
        """Run the program to its end, on that device. A failure is raised by `measurement`, if anybody wants it."""
        command = [sys.executable, "-m", "parity.runs.replay", str(self.job_file)]
        self.ended(*launcher.run(REFERENCE, command, log=self.log, device=device))

    def ended(self, code: int, last: str) -> None:
        """Note how the program ended: its exit code and its last line."""
        if code != EXIT_DONE:
            self._failure = f"the fp64 reference ({REFERENCE_BACKEND}): {last}; the whole log is {self.log}"

    def tell_ended(self, number: int) -> None:
        """Say that run `number` (from 0) has ended, for a program that follows it."""
        if self._ended:
            self._ended[number].touch()

    def remove(self) -> None:
        """Remove what was measured."""
        shutil.rmtree(self._home)

    def measurement(self) -> Measurement:
        """What the program wrote. Raises UserError if it failed."""
        if self._failure:
            raise UserError(self._failure)
        references = tuple(Trace(self._home / f"reference-{number}") for number in range(len(self._runs)))
        return Measurement(references, self._home / "movement", self._draws)


def measured_bounds(
    pair: Pair,
    settings: ReplaySettings,
    *,
    summands: tuple[int, int] = (1, 1),
    launcher: Launcher | None = None,
    device: DeviceKind = "cpu",
    replay: Replay | None = None,
) -> Bounds:
    """Bounds for the two runs of a pair, measured as `settings` say; `replay` has measured them already.

    `summands` is the number of gradients that each side sums. Runs that do not start as the recipe does, or train
    something else, cannot be replayed: they get estimated bounds, and a note that says so.
    """
    run, precision = resolve(load_recipe(settings.recipe, settings.overrides)), settings.precision
    if not _start_as(run, pair):
        scale = lora_scale(run.recipe.method)
        return EstimatedBounds(pair, precision, lora_scale=scale, notes=(ESTIMATED,))
    if replay is None:
        replay = Replay([trace.directory for trace in pair.traces], settings)
        replay.run(launcher or Launcher(), device)
    summation = Summation(run.recipe.precision.reduce, summands)
    return MeasuredBounds(
        pair, precision, measurement=replay.measurement(), rule=rule_of(run), summation=summation
    )


def num_summands(left: Recipe, right: Recipe) -> tuple[int, int]:
    """How many gradients each side sums: one for each accumulation slice and replica."""
    one, other = (recipe.batch.accumulation * recipe.plan.replicas for recipe in (left, right))
    return one, other


def rule_of(run: Run) -> AdamRule:
    """The run's optimizer rule, with the names of the weights that decay."""
    return AdamRule(run.recipe.optimizer, frozenset(p.name for p in run.trained if p.decay))


def _start_as(run: Run, pair: Pair) -> bool:
    """Whether both runs started from equal, finite weights with the recipe's names and shapes, and train the same ones."""
    wanted = {p.name: p.shape for p in run.full_table}
    if pair.names(0, "weight") != set(wanted):
        return False
    for name, shape in wanted.items():
        left, right = pair.read(0, "weight", name)
        if left is None or right is None or left.shape != shape or not np.array_equal(left, right):
            return False
        if not np.isfinite(left.astype(np.float64)).all():
            return False
    trained = {p.name for p in run.trained}
    return all(pair.names(step, "update") == trained for step in range(1, pair.common_steps + 1))
