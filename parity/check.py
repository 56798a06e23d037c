"""`parity check` and `parity diff`: from two sides, or two traces, to a verdict and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from parity.compare import Comparison, compare, ending
from parity.html import Report, write_report
from parity.pair import Pair
from parity.rounding import RoundingBounds
from parity.sides import Ran, Side, resolved_recipe, run_side
from parity.tolerance import Bounds, ProofBounds
from parity.verdict import Verdict
from trainspec.errors import UserError
from trainspec.methods import LoRA
from trainspec.plan import Policy
from trainspec.recipe import load_recipe
from trainspec.trace import Trace

DEFAULT_STEPS = 10


def check(
    recipe_path: Path,
    *,
    left: Side,
    right: Side,
    precision: Policy,
    steps: int,
    overrides: Sequence[str],
    out: Path,
) -> Verdict:
    """Train the recipe on both sides and judge their traces. Writes `out`/verdict.json and report.html.

    `steps` None compares the first ten updates, or all of a shorter run.
    """
    recipe = load_recipe(recipe_path, overrides)
    steps = steps or min(DEFAULT_STEPS, recipe.run.last_step)
    if steps > recipe.run.last_step:
        raise UserError(
            f"--steps {steps}: {recipe_path} makes {recipe.run.last_step} updates; compare at most those"
        )
    ran = [
        run_side(
            side,
            name=name,
            recipe=recipe_path,
            overrides=overrides,
            precision=precision,
            steps=steps,
            out=out,
        )
        for side, name in ((left, "left"), (right, "right"))
    ]
    scale = recipe.method.scale if isinstance(recipe.method, LoRA) else 1.0
    verdict = Verdict(precision, str(left), str(right), _compare(ran, precision, lora_scale=scale))
    recipes = [resolved_recipe(out, name) for name in ("left", "right")]
    _write(verdict, ran, out, recipe=str(recipe_path), settings=overrides, recipes=recipes)
    return verdict


def diff(left: Path, right: Path, *, precision: Policy | None, out: Path | None) -> Verdict:
    """Judge two traces of any origin; `precision` None takes the coarser of the types found in them."""
    ran = [Ran(Trace(left)), Ran(Trace(right))]
    traces = [side.trace for side in ran if side.trace]
    precision = precision or _coarser(traces)
    verdict = Verdict(precision, str(left), str(right), _compare(ran, precision, lora_scale=1.0))
    if out:
        _write(verdict, ran, out, recipe=None, settings=(), recipes=())
    return verdict


def bounds_for(pair: Pair, precision: Policy, *, lora_scale: float) -> Bounds:
    """The bounds that a precision is held to."""
    match precision:
        case "fp64":
            return ProofBounds(pair)
        case "fp32" | "bf16":
            return RoundingBounds(pair, precision, lora_scale=lora_scale)
        case other:
            assert_never(other)


def _compare(ran: Sequence[Ran], precision: Policy, *, lora_scale: float) -> Comparison:
    left, right = (side.trace for side in ran)
    stopped = {name: side.stopped for name, side in zip(("left", "right"), ran, strict=True) if side.stopped}
    if left is None or right is None:  # a side stopped before its first update
        return Comparison(0, tuple(ending((0, 0), stopped)))
    pair = Pair(left, right)
    return compare(pair, bounds_for(pair, precision, lora_scale=lora_scale), stopped=stopped)


def _coarser(traces: Sequence[Trace]) -> Policy:
    """The precision of the coarsest gradients found at step 1."""
    order: tuple[tuple[str, Policy], ...] = (("bfloat16", "bf16"), ("float32", "fp32"), ("float64", "fp64"))
    found = {
        str(trace.read(1, key).dtype)
        for trace in traces
        for key in trace.names(1)
        if key.startswith(("gradient/", "update/"))
    }
    for dtype, precision in order:
        if dtype in found:
            return precision
    raise UserError(
        f"{traces[0].directory}: gradients of type {', '.join(sorted(found)) or 'none'}; say --precision fp64, fp32 or bf16"
    )


def _write(
    verdict: Verdict,
    ran: Sequence[Ran],
    out: Path,
    *,
    recipe: str | None,
    settings: Sequence[str],
    recipes: Sequence[str],
) -> None:
    losses = [[row["loss"] for row in side.trace.rows] if side.trace else [] for side in ran]
    verdict.write(out)
    report = Report(verdict, *losses, recipe=recipe, settings=tuple(settings), recipes=tuple(recipes))
    write_report(out / "report.html", report)
