"""Constant factors: of a whole tensor, of each token, slice, tensor or block of rows, and what counts they may be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES
from parity.comparison.phases import WEIGHT_SHAPED
from parity.diagnosis.fact import Fact
from parity.diagnosis.view import Array, View

# Something explains a difference if what it leaves is below this share of it.
MAX_RESIDUAL = 0.02
# The share that rounding may leave of a difference that a factor explains.
MAX_ROUNDED = 0.1
# Two ratios are called equal if they agree to this, or to how well the factor is known.
SAME_RATIO = 1e-4
FINEST_RATIO, LOOSEST_RATIO = 1e-9, 0.02
# Names are left out where so many of the counts and ratios would fit by chance.
CHANCE = 0.1
MOST_NAMES = 3
# Slices count a whole number of times if they do to this.
MAX_OFF_WHOLE = 0.05
# How often a weight's rows may be split.
WAYS = (2, 4, 8)
# How many tensors are examined for a factor of their own.
TENSORS = 12


def multiple(view: View) -> Iterator[Fact]:
    """A constant factor, what count or ratio it may be, and whether other tensors have it, too."""
    if view.sides is None or view.phase in ("batch", "tokens"):
        return
    found = factor_of(*view.sides, rounding=view.rounding)
    if found is None:
        return
    factor, residual = found
    tolerance = max(FINEST_RATIO, min(4 * residual, SAME_RATIO), min(view.rounding, LOOSEST_RATIO))
    names, tried = _names(view, factor, tolerance)
    single = view.sides[0].size < 3  # any two numbers have a ratio
    if single and not names:
        return
    shown = " or ".join(names[:MOST_NAMES]) + (f", one of {len(names)} that fit" if len(names) > 1 else "")
    named = f": {shown} (of {tried} counts and ratios)" if names else ""
    # The product of A with its input comes before any scale: what multiplies it is dropout's.
    kind = "factor-of-input" if view.phase == "activation" and view.tensor.endswith(".lora_A") else "factor"
    yield Fact(kind, f"right is {factor:.7g} times left{named}")
    if names:
        yield Fact("count-factor", f"right is {factor:.7g} times left{named}")


def factor_of(left: Array, right: Array, *, rounding: float = 0.0) -> tuple[float, float] | None:
    """(factor, residual as a share of right) if right is a multiple of left; None if not, or if it is left itself.

    `rounding` is how far the two may be apart by rounding, as a share of their norm.
    """
    top, bottom = float(np.sum(left * right)), float(np.sum(left**2))
    apart, size = float(np.linalg.norm(right - left)), float(np.linalg.norm(right))
    if not top or not bottom or not apart or not size:
        return None
    factor = top / bottom
    residual = float(np.linalg.norm(right - factor * left))
    return (factor, residual / size) if residual <= explained(apart, rounding * size, MAX_ROUNDED) else None


def explained(apart: float, rounding: float, most: float) -> float:
    """What may be left of a difference `apart` for it to be explained: a small share, or `rounding` up to the share `most`."""
    return max(MAX_RESIDUAL * apart, min(rounding, most * apart))


def _names(view: View, factor: float, tolerance: float) -> tuple[list[str], int]:
    """Every count or ratio that equals the factor, none where as many would by chance; and how many were tried."""
    counts = dict(view.counts) | _batch_counts(view) | _plan_counts(view)
    tried = [
        (name, value) for name, value in _ratios(counts) if abs(value - 1.0) > max(SAME_RATIO, tolerance)
    ]
    near = sum(0.5 <= value / factor <= 2.0 for _, value in tried) if factor > 0 else 0
    fitting = [name for name, value in tried if math.isclose(factor, value, rel_tol=tolerance)]
    by_chance = near * 2 * tolerance / math.log(4.0)
    return (fitting if by_chance <= CHANCE else []), len(tried)


def _batch_counts(view: View) -> dict[str, float]:
    labels, segments = view.batch("labels"), view.batch("segments")
    if labels is None or segments is None or labels.ndim != 2:
        return {}
    return {
        "target tokens": float(view.targets()),
        "tokens that are no padding": float((segments != 0).sum()),
        "positions": float(labels.size),
        "examples": float(labels.shape[0]),
        "sequence tokens": float(labels.shape[1]),
    }


def _plan_counts(view: View) -> dict[str, float]:
    ways = {"replicas": view.replicas, "tensor ranks": view.ways("tensor"), "stages": view.ways("pipe")}
    return {name: float(count) for name, count in ways.items() if count > 1}


def _ratios(counts: dict[str, float]) -> Iterator[tuple[str, float]]:
    for name, count in counts.items():
        if count > 0:
            yield name, count
            yield f"1 / {name}", 1.0 / count
    for one, a in counts.items():
        for other, b in counts.items():
            if one != other and b > 0:
                yield f"{one} / {other}", a / b


def other_factors(view: View) -> Iterator[Fact]:
    """Whether the tensors of the phase have one factor, each its own, or blocks of rows their own."""
    if view.phase not in WEIGHT_SHAPED or view.sides is None:
        return
    factors = {}
    for finding in view.failing[:TENSORS]:
        name = finding.location.tensor
        both = view.both(view.phase, name)
        found = factor_of(*both, rounding=view.rounding) if both else None
        if both and found is None and np.array_equal(*both):
            found = 1.0, 0.0
        if found is None:
            break
        factors[name] = found[0]
    values = np.array(list(factors.values()))
    if len(factors) == min(len(view.failing), TENSORS) and len(factors) > 1:
        if np.allclose(values, values[0], rtol=_same(view)):
            yield Fact(
                "one-factor",
                f"all {len(view.failing)} tensors that differ do so by the factor {values[0]:.7g}",
            )
        else:
            yield Fact(
                "factor-by-tensor",
                f"each tensor has a factor of its own, {values.min():.4g} to {values.max():.4g}",
            )
    elif factor_of(*view.sides, rounding=view.rounding) is None:
        for axis in range(view.sides[0].ndim):
            for ways in WAYS:
                blocks = [np.array_split(side, ways, axis=axis) for side in view.sides]
                found = [
                    factor_of(*each, rounding=view.rounding)
                    or ((1.0, 0.0) if np.array_equal(*each) else None)
                    for each in zip(*blocks, strict=True)
                ]
                if view.sides[0].shape[axis] >= 2 * ways and all(found):
                    shown = ", ".join(f"{each[0]:.4g}" for each in found if each)
                    yield Fact(
                        "factor-by-rows",
                        f"{ways} blocks of {'rows' if axis == 0 else 'columns'} have the factors {shown}",
                    )
                    return


def by_token(view: View) -> Iterator[Fact]:
    """A factor of its own at each token, as a norm's epsilon makes it."""
    if view.sides is None or view.sides[0].ndim < 3 or view.phase != "activation":
        return
    left, right = (side.reshape(-1, side.shape[-1]) for side in view.sides)
    apart = np.linalg.norm(right - left)
    tops, bottoms = np.sum(left * right, axis=1), np.sum(left**2, axis=1)
    factors = np.divide(tops, bottoms, out=np.ones(len(tops)), where=bottoms > 0)
    if (
        left.shape[1] > 2
        and apart
        and np.linalg.norm(right - factors[:, None] * left) <= MAX_RESIDUAL * apart
    ):
        off = factors[bottoms > 0]
        if np.ptp(off) > SAME_RATIO * float(np.abs(off - 1.0).max()):
            yield Fact(
                "factor-by-token", f"each token's vector is a multiple, by {off.min():.6g} to {off.max():.6g}"
            )


def by_slice(view: View) -> Iterator[Fact]:
    """A factor of its own for the examples of each accumulation slice, microbatch or replica; gradients only."""
    if view.phase != "activation_gradient" or view.sides is None or view.sides[0].ndim < 2:
        return
    partitions = [view.slices(), view.rows_of_replicas(), [np.array([i]) for i in range(len(view.sides[0]))]]
    for rows in partitions:
        if len(rows) < 2 or max(part.max() for part in rows) >= len(view.sides[0]):
            continue
        factors = [_of_rows(view, part) for part in rows]
        known = [each for each in factors if each is not None]
        if len(known) == len(factors) and _several(known, max(1e-6, view.rounding)):
            yield from _slices(view, rows, known)
            return


def _several(factors: list[float], same: float) -> bool:
    """Whether factors differ by more than the share `same`. NaN, of examples without a gradient on either side, is none."""
    known = [each for each in factors if not math.isnan(each)]
    if not known or math.inf in known:
        return len(set(known)) > 1
    return max(known) - min(known) > same * max(abs(each) for each in known)


def _same(view: View) -> float:
    """Two factors are called equal if their ratio is 1 to this."""
    return max(SAME_RATIO, view.rounding)


def _of_rows(view: View, rows: Array) -> float | None:
    """The factor of some examples: 0 or infinite where one side is zero, NaN where both are, None if there is none."""
    if view.sides is None:
        return None
    left, right = (side[rows] for side in view.sides)
    if not left.any() or not right.any():
        return math.nan if left.any() == right.any() else math.inf if right.any() else 0.0
    if np.abs(left - right).max() <= view.allowed:
        return 1.0
    found = factor_of(left, right, rounding=view.rounding)
    return found[0] if found else None


def _slices(view: View, rows: list[Array], factors: list[float]) -> Iterator[Fact]:
    shown = ", ".join("–" if math.isnan(each) else f"{each:.4g}" for each in factors)
    counted = [each for each in factors if not math.isnan(each)]
    yield Fact("factor-by-slice", f"examples {[part.tolist() for part in rows]} have the factors {shown}")
    if any(each in (0.0, math.inf) for each in counted):
        side = NAMES[1 if 0.0 in counted else 0]
        yield Fact("slice-missing", f"{side} has no gradient from the examples of a slice: factors {shown}")
        return
    targets = [view.targets(part) for part in rows]
    expected = [view.targets() / (n * sum(t > 0 for t in targets)) if n else math.nan for n in targets]
    every = [view.targets() / (n * len(rows)) if n else math.nan for n in targets]
    for means in (expected, every):
        for turned in (counted, [1.0 / each for each in counted]):
            wanted = [m for m, f in zip(means, factors, strict=True) if not math.isnan(f)]
            if _several(wanted, _same(view)) and np.allclose(turned, wanted, rtol=_same(view)):
                yield Fact(
                    "mean-of-slices",
                    f"factors {shown} are those of slices with {targets} targets, averaged each by itself",
                )
                return
    others = [max(each, 1 / each) for each in counted if abs(each - 1.0) > _same(view)]
    near = [max(SAME_RATIO, min(view.rounding * each, MAX_OFF_WHOLE)) for each in others]
    if len(others) < len(counted) and all(
        each > 1.5 and abs(each - round(each)) <= off for each, off in zip(others, near, strict=True)
    ):
        yield Fact("slice-doubled", f"the examples of a slice count more often: factors {shown}")
