"""`parity check`: from two sides to a verdict and its report."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import assert_never

from parity.comparison.compare import Comparison
from parity.comparison.pair import Pair
from parity.comparison.tolerance import Bounds, ProofBounds
from parity.diagnosis import Diagnosis, counts_of, diagnose
from parity.judging.judge import compare_sides, traces_of, write_report_of
from parity.judging.measure import Replay, ReplaySettings, measured_bounds, num_summands
from parity.judging.steps import DEFAULT_STEPS
from parity.report.next import next_commands
from parity.report.verdict import Verdict
from parity.runs.devices import (
    ON_CORES,
    REFERENCE_BACKEND,
    Look,
    Placement,
    Program,
    look_for,
    placed,
)
from parity.runs.plans import refusal
from parity.runs.programs import Launcher, Watcher
from parity.runs.roundings import DRAWS
from parity.runs.sides import NAMES, Resumption, Side, SideResult, SideTraining, as_options, resolved_recipe
from parity.runs.work import REFERENCE, Size, Work, fit_at_once, size_of
from trainspec.data import open_dataset
from trainspec.errors import UserError
from trainspec.plans.names import Backend, Device, Policy
from trainspec.recipe import Recipe, RunLength, load_recipe
from trainspec.runs.run import Run, resolve
from trainspec.schedule import learning_rate


def check(
    recipe_path: Path,
    *,
    left: Side,
    right: Side,
    precision: Policy,
    steps: int | None,
    overrides: Sequence[str],
    out: Path,
    device: Device = "cpu",
    resumption: Resumption | None = None,
    watcher: Watcher | None = None,
    look: Look = look_for,
) -> Verdict:
    """Train the recipe on both sides and judge their traces. Writes `out`/verdict.json and report.html.

    `device` is that of the reference, and of each side that names none; `look` finds what there is of it. `watcher` is told what
    runs and how far it is.

    `steps` None compares the first ten updates, or all of a shorter run. If loss or gradients differ, both sides are
    trained again up to that step, with its activations, to locate the first divergence. `resumption` has sides train in two
    parts, the second resumed from a checkpoint. Raises UserError for a mistake in the arguments or the recipe.
    """
    recipe = load_recipe(recipe_path, overrides)
    steps = _steps_to_compare(recipe_path, recipe, steps, resumption)
    sides = _recipes_of((left, right), recipe_path, overrides, precision)
    placement = _placed((left, right), sides, device, precision, look)
    _clear(out)
    launcher = Launcher(watcher)
    request = _Request(
        recipe_path,
        tuple(overrides),
        precision,
        (left, right),
        num_summands(*sides),
        counts_of(recipe),
        _known_run(recipe),
        all(side.plan.devices == 1 for side in sides),
        launcher,
        device,
        placement,
        resumption,
    )
    closer: Sequence[SideResult] = ()
    try:
        results, comparison = request.judged(steps, out=out)
        verdict = Verdict(precision, *request.labels, comparison, request.diagnose(comparison, results))
        if step := _step_to_refine(comparison):
            verdict, closer = request.refined(verdict, step, out=out / "first-divergence")
        verdict = _with_note(verdict, placement.reason)
    finally:
        launcher.watcher.finished()
    recipes = [resolved_recipe(out, name) for name in NAMES]
    write_report_of(
        verdict, results, out, recipe=str(recipe_path), settings=overrides, recipes=recipes, closer=closer,
        heads=request.heads, following=next_commands(verdict, request.arguments, out),
    )  # fmt: skip
    return verdict


def _steps_to_compare(
    recipe_path: Path, recipe: Recipe, steps: int | None, resumption: Resumption | None
) -> int:
    """How many updates are compared. Raises UserError where the recipe makes fewer, or they would prove nothing."""
    span = recipe.span(lambda: open_dataset(resolve(recipe), "train").num_examples)
    steps = steps or min(DEFAULT_STEPS, span.last)
    if steps > span.last:
        raise UserError(f"--steps {steps}: {recipe_path} makes {span.last} updates; compare at most those")
    if resumption and resumption.after >= steps:
        raise UserError(
            f"--resume-at {resumption.after}: {steps} updates are compared; resume after an earlier one"
        )
    _check_rates(recipe, span, steps)
    return steps


def _recipes_of(
    sides: tuple[Side, Side], recipe_path: Path, overrides: Sequence[str], precision: Policy
) -> list[Recipe]:
    """Both sides' recipes: a mistake in the right one must show before the left side is trained. Raises UserError."""
    recipes = [load_recipe(recipe_path, (*overrides, *side.overrides)) for side in sides]
    for name, side, recipe in zip(NAMES, sides, recipes, strict=True):
        if line := refusal(recipe.plan, precision, side.backend):
            raise UserError(f"{name} ({side}): {line}")
    return recipes


def _clear(out: Path) -> None:
    """Remove what an earlier check left. Raises UserError for a directory that is not a check's."""
    if (out / "checkpoints").exists() or (out / "recipe.yaml").exists():
        raise UserError(f"--out {out}: holds a training run; give the check its own directory")
    for old in ("first-divergence", "measured"):
        shutil.rmtree(out / old, ignore_errors=True)


def _placed(
    sides: tuple[Side, Side], recipes: Sequence[Recipe], device: Device, precision: Policy, look: Look
) -> Placement:
    """The device of each program. Raises UserError where there is no such device, or not as many as a plan takes."""
    wanted = [
        Program(
            name,
            f"{name} ({side})",
            side.backend,
            side.device or device,
            recipe.plan.devices,
            on_cores=f"--{name} {shlex.quote(str(replace(side, device='cpu')))}",
        )
        for name, side, recipe in zip(NAMES, sides, recipes, strict=True)
    ]
    if precision != "fp64":
        wanted.append(
            Program(REFERENCE, f"the float64 reference ({REFERENCE_BACKEND})", REFERENCE_BACKEND, device)
        )
    return placed(wanted, float64=precision == "fp64", look=look)


def _with_note(verdict: Verdict, note: str | None) -> Verdict:
    if note is None:
        return verdict
    comparison = verdict.comparison
    return replace(verdict, comparison=replace(comparison, notes=(*comparison.notes, note)))


def _check_rates(recipe: Recipe, span: RunLength, steps: int) -> None:
    """Raises UserError if no compared update moves a weight: agreement would prove nothing."""
    rates = (
        learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=step, steps=span.steps)
        for step in range(steps)
    )
    if not any(rates):
        raise UserError(f"--steps {steps}: the learning rate is 0 in all of them; compare more steps")


@dataclass(frozen=True)
class _Request:
    """The arguments of a check, resolved. `run` is None if there is no such model; `single`: both sides compute on one device."""

    recipe: Path
    overrides: tuple[str, ...]
    precision: Policy
    sides: tuple[Side, Side]
    summands: tuple[int, int]
    counts: Mapping[str, float]
    run: Run | None
    single: bool
    launcher: Launcher
    device: Device = "cpu"
    placement: Placement = ON_CORES
    resumption: Resumption | None = None

    @property
    def labels(self) -> tuple[str, str]:
        """Both sides as the verdict names them."""
        left, right = (
            f"{side}{self._told_device(name)}{self.resumption.describe(name) if self.resumption else ''}"
            for side, name in zip(self.sides, NAMES, strict=True)
        )
        return left, right

    def _told_device(self, name: str) -> str:
        """Where a side computes, to go after its settings; empty where all is on the cores."""
        return "" if self.placement.on_cores else f" on {self.placement.of(name)}"

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Of every weight that has heads, along which dimension and how many."""
        if self.run is None:
            return {}
        counts = {"heads": self.run.spec.heads, "kv_heads": self.run.spec.kv_heads}
        return {
            param.name: (dim, counts[axis])
            for param in self.run.full_table
            for dim, axis in enumerate(param.axes)
            if axis in counts
        }

    @property
    def _recipe_arguments(self) -> list[str]:
        """Those of the command line that name the recipe."""
        return [str(self.recipe), *as_options(self.overrides)]

    @property
    def arguments(self) -> list[str]:
        """Those of the command line that ask for the same check, but for precision and steps."""
        words = [*self._recipe_arguments, "--left", str(self.sides[0]), "--right", str(self.sides[1])]
        words += ["--device", self.device] if self.device != "cpu" else []
        if self.resumption:
            one = [f"{side}:" for side in self.resumption.sides if len(self.resumption.sides) == 1]
            words += ["--resume-at", f"{''.join(one)}{self.resumption.after}"]
            words += ["--continue-from", "other"] if self.resumption.from_other else []
        return words

    @property
    def _size(self) -> Size | None:
        return size_of(self.run) if self.run else None

    def judged(
        self, steps: int, *, out: Path, activations_at: int | None = None
    ) -> tuple[list[SideResult], Comparison]:
        """Train both sides, in fp32 and bf16 repeat every step in float64, and compare."""
        common = self.recipe, self.overrides, self.precision, out, self.launcher
        trainings = {
            name: SideTraining(side, name, *common, device=self.placement.of(name))
            for side, name in zip(self.sides, NAMES, strict=True)
        }
        for training in trainings.values():
            training.clear()
        work = self._work(steps, closer=activations_at is not None)
        self.launcher.watcher.planned(work)
        # A trace of two parts is joined at its end: the reference cannot follow it.
        follows = work.at_once and bool(work.draws) and self._resumption_within(steps) is None
        replay = self._replay(trainings, out, activations_at) if follows else None
        results = self._train(trainings, steps, work, activations_at, replay)
        return results, self._judge(results, out=out, activations_at=activations_at, replay=replay)

    def _work(self, steps: int, *, closer: bool) -> Work:
        """What is about to run."""
        draws = 0 if self.precision == "fp64" else DRAWS[self.precision]
        resumption = self._resumption_within(steps)
        work = Work(
            str(self.recipe), self._labelled, self._size, self.precision, steps, draws, closer=closer,
            on_cores=self.placement.on_cores,
        )  # fmt: skip
        if not self.placement.on_cores:  # they share a device
            return work
        if self._size is None or not self.single or (resumption and resumption.from_other):
            return work
        return replace(work, at_once=fit_at_once(self._size, self.precision, programs=2 + bool(draws)))

    @property
    def _labelled(self) -> tuple[tuple[str, Backend], tuple[str, Backend]]:
        (left, right), (one, other) = self.labels, self.sides
        return (left, one.backend), (right, other.backend)

    def _resumption_within(self, steps: int) -> Resumption | None:
        return self.resumption if self.resumption and self.resumption.after < steps else None

    def _replay(self, trainings: Mapping[str, SideTraining], out: Path, activations_at: int | None) -> Replay:
        """The reference that follows both trainings."""
        assert self.precision != "fp64"
        settings = ReplaySettings(self.recipe, self.overrides, self.precision, out, activations_at)
        return Replay([training.trace for training in trainings.values()], settings, follows=True)

    def _train(
        self,
        trainings: Mapping[str, SideTraining],
        steps: int,
        work: Work,
        activations_at: int | None,
        replay: Replay | None,
    ) -> list[SideResult]:
        """Train both sides, at the same time or one after the other; one that continues from the other comes last."""
        resumption = self._resumption_within(steps)
        results: dict[str, SideResult] = {}

        def train(name: str) -> None:
            training = trainings[name]
            if resumption is None or name not in resumption.sides:
                saved = resumption.after if resumption and resumption.from_other else None
                results[name] = training.run(steps, activations_at=activations_at, checkpoint_at=saved)
            elif resumption.from_other:
                ((other, before),) = results.items()
                results[name] = training.continue_from(
                    trainings[other], before, steps, after=resumption.after, activations_at=activations_at
                )
            else:
                results[name] = training.run_in_two(
                    steps, after=resumption.after, activations_at=activations_at
                )
            if replay:
                replay.tell_ended(NAMES.index(name))

        first_whole = sorted(NAMES, key=lambda name: bool(resumption and name in resumption.sides))
        tasks = [partial(train, name) for name in first_whole]
        if work.at_once:
            self.launcher.at_once([*tasks, *([partial(replay.run, self.launcher)] if replay else [])])
        else:
            for task in tasks:
                task()
        return [results[name] for name in NAMES]

    def _judge(
        self, results: Sequence[SideResult], *, out: Path, activations_at: int | None, replay: Replay | None
    ) -> Comparison:
        """Compare with the bounds of the precision, which are measured in fp32 and bf16."""

        def bounds(pair: Pair) -> Bounds:
            match self.precision:
                case "fp64":
                    made = ProofBounds(pair)
                case "fp32" | "bf16" as low:
                    settings = ReplaySettings(self.recipe, self.overrides, low, out, activations_at)
                    made = measured_bounds(
                        pair, settings, summands=self.summands, launcher=self.launcher,
                        device=self.placement.reference, replay=replay,
                    )  # fmt: skip
                case other:
                    assert_never(other)
            self.launcher.watcher.comparing()
            return made

        return compare_sides(results, bounds)

    def refined(self, verdict: Verdict, step: int, *, out: Path) -> tuple[Verdict, Sequence[SideResult]]:
        """The verdict with `step` judged again, activations included, where an earlier divergence may show.

        Everything goes under `out`. Returns the sides of the second look as well, if the verdict is about them. If the step
        holds the second time, the verdict stays as it is.
        """
        results, second = self.judged(step, out=out, activations_at=step)
        if second.holds:
            return verdict, ()
        before, after = (
            [f for f in verdict.comparison.findings if f.location.step < step],
            [f for f in verdict.comparison.findings if f.location.step > step],
        )
        # The second comparison adds locations; one that failed in the first stays failed.
        failed = {
            f.location: f for f in verdict.comparison.findings if f.location.step == step and not f.holds
        }
        again = [
            failed.get(f.location, f) if f.holds else f for f in second.findings if f.location.step == step
        ]
        comparison = replace(verdict.comparison, findings=(*before, *again, *after))
        diagnosis = self.diagnose(comparison, results)
        return replace(verdict, comparison=comparison, diagnosis=diagnosis), results

    def diagnose(self, comparison: Comparison, results: Sequence[SideResult]) -> Diagnosis | None:
        """What the first divergence looks like, and what to run next with this recipe."""
        found = diagnose(comparison, traces_of(results), counts=self.counts)
        recipe = shlex.join(self._recipe_arguments)
        return found.for_sides(recipe, self.sides[1].backend) if found else None


def _known_run(recipe: Recipe) -> Run | None:
    """The recipe's run; None if there is no such model, which the side that looks for it says."""
    try:
        return resolve(recipe)
    except UserError:
        return None


def _step_to_refine(comparison: Comparison) -> int | None:
    """The step of the first divergence if activations can tell more: if it is in the loss or a gradient."""
    first = comparison.first_divergence
    return first.location.step if first and first.location.phase in ("loss", "gradient") else None
