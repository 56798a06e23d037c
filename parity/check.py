"""`parity check`: from two sides to a verdict and its report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from parity.comparison.compare import Comparison
from parity.comparison.pair import Pair
from parity.comparison.tolerance import Bounds, ProofBounds
from parity.diagnosis import Diagnosis, counts_of, diagnose
from parity.judge import compare_sides, traces_of, write_report_of
from parity.measure import measured_bounds
from parity.report.verdict import Verdict
from parity.runs.plans import refusal
from parity.runs.sides import NAMES, Resumption, Side, SideResult, SideTraining, resolved_recipe
from trainspec.data import open_dataset
from trainspec.errors import UserError
from trainspec.plans.plan import Policy
from trainspec.recipe import Recipe, RunLength, load_recipe
from trainspec.runs.run import resolve
from trainspec.schedule import learning_rate

DEFAULT_STEPS = 10


def check(
    recipe_path: Path,
    *,
    left: Side,
    right: Side,
    precision: Policy,
    steps: int | None,
    overrides: Sequence[str],
    out: Path,
    resumption: Resumption | None = None,
) -> Verdict:
    """Train the recipe on both sides and judge their traces. Writes `out`/verdict.json and report.html.

    `steps` None compares the first ten updates, or all of a shorter run. If loss or gradients differ, both sides are
    trained again up to that step, with its activations, to locate the first divergence. `resumption` has sides train in two
    parts, the second resumed from a checkpoint. Raises UserError for a mistake in the arguments or the recipe.
    """
    recipe = load_recipe(recipe_path, overrides)
    span = recipe.span(lambda: open_dataset(resolve(recipe), "train").num_examples)
    steps = steps or min(DEFAULT_STEPS, span.last)
    if steps > span.last:
        raise UserError(f"--steps {steps}: {recipe_path} makes {span.last} updates; compare at most those")
    if resumption and resumption.after >= steps:
        raise UserError(
            f"--resume-at {resumption.after}: {steps} updates are compared; resume after an earlier one"
        )
    _check_rates(recipe, span, steps)
    # A mistake in the right side's recipe must show before the left side is trained.
    sides = [load_recipe(recipe_path, (*overrides, *side.overrides)) for side in (left, right)]
    for name, side, resolved in zip(NAMES, (left, right), sides, strict=True):
        if line := refusal(resolved.plan, precision, side.backend):
            raise UserError(f"{name} ({side}): {line}")
    if (out / "checkpoints").exists() or (out / "recipe.yaml").exists():
        raise UserError(f"--out {out}: holds a training run; give the check its own directory")
    for old in ("first-divergence", "measured"):  # of an earlier check
        shutil.rmtree(out / old, ignore_errors=True)
    request = _Request(
        recipe_path,
        tuple(overrides),
        precision,
        (left, right),
        _summands(*sides),
        counts_of(recipe),
        resumption,
    )
    results = request.run(steps, out=out)
    comparison = request.judge(results, out=out)
    verdict = Verdict(precision, *request.labels, comparison, request.diagnose(comparison, results))
    if (step := _step_to_refine(comparison)) and not any(side.stopped for side in results):
        verdict = request.refined(verdict, step, out=out / "first-divergence")
    recipes = [resolved_recipe(out, name) for name in NAMES]
    write_report_of(verdict, results, out, recipe=str(recipe_path), settings=overrides, recipes=recipes)
    return verdict


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
    """The arguments of a check, resolved."""

    recipe: Path
    overrides: tuple[str, ...]
    precision: Policy
    sides: tuple[Side, Side]
    summands: tuple[int, int]
    counts: Mapping[str, float]
    resumption: Resumption | None = None

    @property
    def labels(self) -> tuple[str, str]:
        """Both sides as the verdict names them."""
        left, right = (
            f"{side}{self.resumption.describe(name) if self.resumption else ''}"
            for side, name in zip(self.sides, NAMES, strict=True)
        )
        return left, right

    def run(self, steps: int, *, out: Path, activations_at: int | None = None) -> list[SideResult]:
        """Train both sides, one after the other; one that continues from the other comes last."""
        trainings = {
            name: SideTraining(side, name, self.recipe, self.overrides, self.precision, out)
            for side, name in zip(self.sides, NAMES, strict=True)
        }
        resumption = self.resumption if self.resumption and self.resumption.after < steps else None
        if resumption is None:
            return [training.run(steps, activations_at=activations_at) for training in trainings.values()]
        after, results = resumption.after, {}
        for name, training in sorted(trainings.items(), key=lambda each: each[0] in resumption.sides):
            if name not in resumption.sides:
                saved = after if resumption.from_other else None
                results[name] = training.run(steps, activations_at=activations_at, checkpoint_at=saved)
            elif resumption.from_other:
                ((other, before),) = results.items()
                results[name] = training.continue_from(
                    trainings[other], before, steps, after=after, activations_at=activations_at
                )
            else:
                results[name] = training.run_in_two(steps, after=after, activations_at=activations_at)
        return [results[name] for name in NAMES]

    def judge(
        self, results: Sequence[SideResult], *, out: Path, activations_at: int | None = None
    ) -> Comparison:
        """Compare with the bounds of the precision, which are measured in fp32 and bf16."""

        def bounds(pair: Pair) -> Bounds:
            match self.precision:
                case "fp64":
                    return ProofBounds(pair)
                case "fp32" | "bf16" as low:
                    return measured_bounds(
                        pair, low, recipe=self.recipe, overrides=self.overrides, out=out,
                        summands=self.summands, activations_at=activations_at,
                    )  # fmt: skip
                case other:
                    assert_never(other)

        return compare_sides(results, bounds)

    def refined(self, verdict: Verdict, step: int, *, out: Path) -> Verdict:
        """The verdict with `step` judged again, activations included, where an earlier divergence may show.

        Everything goes under `out`. If the step holds the second time, the verdict stays as it is.
        """
        results = self.run(step, out=out, activations_at=step)
        if any(side.stopped for side in results):
            return verdict
        second = self.judge(results, out=out, activations_at=step)
        if second.holds:
            return verdict
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
        return replace(verdict, comparison=comparison, diagnosis=self.diagnose(comparison, results))

    def diagnose(self, comparison: Comparison, results: Sequence[SideResult]) -> Diagnosis | None:
        """What the first divergence looks like, and what to run next with this recipe."""
        found = diagnose(comparison, traces_of(results), counts=self.counts)
        settings = "".join(f" --set {override}" for override in self.overrides)
        return found.for_sides(f"{self.recipe}{settings}", self.sides[1].backend) if found else None


def _summands(left: Recipe, right: Recipe) -> tuple[int, int]:
    """How many gradients each side sums: one for each accumulation slice and replica."""
    one, other = (recipe.batch.accumulation * recipe.plan.replicas for recipe in (left, right))
    return one, other


def _step_to_refine(comparison: Comparison) -> int | None:
    """The step of the first divergence if activations can tell more: if it is in the loss or a gradient."""
    first = comparison.first_divergence
    return first.location.step if first and first.location.phase in ("loss", "gradient") else None
