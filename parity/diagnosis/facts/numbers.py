"""What the numbers are: multiples, zeros, roundings, what has not changed, what is left over when one is taken from the other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES
from parity.comparison.phases import SCALAR_TENSORS, WEIGHT_SHAPED
from parity.diagnosis.fact import Fact
from parity.diagnosis.view import Array, View

# A factor explains a difference if the residual is below this share of it.
MAX_RESIDUAL = 0.02
# Two ratios are called equal if they agree to this, or to how well the factor is known.
SAME_RATIO = 1e-4
FINEST_RATIO = 1e-9
# Names are left out where so many of the counts and ratios would fit by chance.
CHANCE = 0.1
MOST_NAMES = 3
# Fewer numbers than these are bfloat16 numbers, or zero, by chance.
ENOUGH = 16
# Digits of a type, in bits; sums of a few bfloat16 numbers have at most so many, of float64 or float32 numbers.
BF16_BITS, FP32_BITS, SUM_BITS = 8, 24, {8: 20, 4: 16}
ALL, MOST_OF, FEW = 0.999, 0.9, 0.5
# The size of a rounding to bfloat16, give or take what follows it.
ROUNDING = (2.0**-13, 2.0**-6)
SMALL = 0.01
# A rounding goes up as often as down, so its error is not a multiple of the number.
UNRELATED = 0.3
# How often a weight's rows may be split.
WAYS = (2, 4, 8)
# How many tensors are examined for a factor of their own.
TENSORS = 12


def incomparable(view: View) -> Iterator[Fact]:
    """Why there are no two arrays to compare."""
    left, right = view.raw
    if left is None or right is None:
        if left is not right:
            yield Fact("missing", f"{view.tensor} is missing in {NAMES[0 if left is None else 1]}")
    elif left.shape != right.shape:
        yield Fact("another-shape", f"shape {list(left.shape)} in left, {list(right.shape)} in right")
    else:
        sides = [side.astype(np.float64) for side in (left, right)]
        for name, side in zip(NAMES, sides, strict=True):
            if not np.isfinite(side).all():
                yield Fact(
                    "not-finite",
                    f"{np.count_nonzero(~np.isfinite(side))} of {side.size} numbers are not finite in {name}",
                )


def multiple(view: View) -> Iterator[Fact]:
    """A constant factor, what count or ratio it may be, and whether other tensors have it, too."""
    if view.sides is None or view.phase in ("batch", "tokens"):
        return
    found = factor_of(*view.sides)
    if found is None:
        return
    factor, residual = found
    names, tried = _names(view, factor, max(FINEST_RATIO, 4 * residual))
    single = view.sides[0].size < 3  # any two numbers have a ratio
    if single and not names:
        return
    shown = " or ".join(names[:MOST_NAMES]) + (f", one of {len(names)} that fit" if len(names) > 1 else "")
    named = f": {shown} (of {tried} counts and ratios)" if names else ""
    yield Fact("factor", f"right is {factor:.7g} times left{named}")
    if names:
        yield Fact("count-factor", f"right is {factor:.7g} times left{named}")


def factor_of(left: Array, right: Array) -> tuple[float, float] | None:
    """(factor, residual as a share of right) if right is a multiple of left; None if not, or if it is left itself."""
    top, bottom = float(np.sum(left * right)), float(np.sum(left**2))
    apart, size = float(np.linalg.norm(right - left)), float(np.linalg.norm(right))
    if not top or not bottom or not apart or not size:
        return None
    factor = top / bottom
    residual = float(np.linalg.norm(right - factor * left))
    return (factor, residual / size) if residual <= MAX_RESIDUAL * apart else None


def _names(view: View, factor: float, tolerance: float) -> tuple[list[str], int]:
    """Every count or ratio that equals the factor, none where as many would by chance; and how many were tried."""
    counts = dict(view.counts) | _batch_counts(view) | _plan_counts(view)
    tried = [(name, value) for name, value in _ratios(counts) if abs(value - 1.0) > SAME_RATIO]
    tolerance = min(tolerance, SAME_RATIO)
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
        found = factor_of(*both) if both else None
        if both and found is None and np.array_equal(*both):
            found = 1.0, 0.0
        if found is None:
            break
        factors[name] = found[0]
    values = np.array(list(factors.values()))
    if len(factors) == min(len(view.failing), TENSORS) and len(factors) > 1:
        if np.allclose(values, values[0], rtol=SAME_RATIO):
            yield Fact(
                "one-factor",
                f"all {len(view.failing)} tensors that differ do so by the factor {values[0]:.7g}",
            )
        else:
            yield Fact(
                "factor-by-tensor",
                f"each tensor has a factor of its own, {values.min():.4g} to {values.max():.4g}",
            )
    elif factor_of(*view.sides) is None:
        for axis in range(view.sides[0].ndim):
            for ways in WAYS:
                blocks = [np.array_split(side, ways, axis=axis) for side in view.sides]
                found = [
                    factor_of(*each) or ((1.0, 0.0) if np.array_equal(*each) else None)
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
        if all(each is not None for each in factors) and len({round(each or 0, 6) for each in factors}) > 1:
            yield from _slices(view, rows, [each if each is not None else math.nan for each in factors])
            return


def _of_rows(view: View, rows: Array) -> float | None:
    """The factor of some examples: 0 or infinite where one side is zero, NaN where both are, None if there is none."""
    if view.sides is None:
        return None
    left, right = (side[rows] for side in view.sides)
    if not left.any() or not right.any():
        return math.nan if left.any() == right.any() else math.inf if right.any() else 0.0
    if np.abs(left - right).max() <= view.allowed:
        return 1.0
    found = factor_of(left, right)
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
            if np.allclose(turned, wanted, rtol=SAME_RATIO):
                yield Fact(
                    "mean-of-slices",
                    f"factors {shown} are those of slices with {targets} targets, averaged each by itself",
                )
                return
    others = [each for each in counted if abs(each - 1.0) > SAME_RATIO]
    if len(others) < len(counted) and all(
        abs(x - round(x)) < SAME_RATIO for each in others for x in (max(each, 1 / each),)
    ):
        yield Fact("slice-doubled", f"the examples of a slice count more often: factors {shown}")


def zeros(view: View) -> Iterator[Fact]:
    """What is zero on one side only: everything, a block, or scattered elements."""
    for name, side, other in view.named_sides():
        if side.size > 1 and not side.any() and other.any():
            yield Fact("zero", f"{view.tensor} is zero in {name}")
            yield from _swapped(view, name)
            return
        if side.ndim == 2 and (block := _block(side == 0, other != 0)):
            yield Fact("zero-block", f"{block} are zero in {name}")
    if view.sides is not None and view.sides[0].size >= ENOUGH and view.phase == "activation":
        left, right = (side == 0 for side in view.sides)
        if (left ^ right).mean() > 0.01 and left.mean() > 0.005 and right.mean() > 0.005:
            yield Fact("zero-elements", "the two sides are zero at different elements")


def _swapped(view: View, side: str) -> Iterator[Fact]:
    """Another starting weight that is zero on the other side, and random on this one."""
    if view.phase != "initial":
        return
    at = NAMES.index(side)
    for finding in view.failing:
        both = view.both(finding.location.group, finding.location.tensor)
        if both and both[at].any() and not both[1 - at].any():
            yield Fact(
                "swapped", f"{view.tensor} is zero in {side}, {finding.location.tensor} in {NAMES[1 - at]}"
            )
            return


def _block(mask: Array, elsewhere: Array) -> str | None:
    """The rows or columns in which `mask` holds and `elsewhere` too, if they are one block and not all."""
    for axis, what in ((1, "rows"), (0, "columns")):
        alive = np.asarray(elsewhere.any(axis=axis))
        inside = np.asarray(mask.all(axis=axis)) & alive
        at = np.flatnonzero(inside)
        if len(at) < 2 or inside[alive].all():
            continue
        within = np.arange(len(inside))
        between = (within >= at[0]) & (within <= at[-1])
        if inside[between & alive].all() and (between.sum() >= len(inside) // 8):
            return f"{what} {at[0]} to {at[-1]} of {len(inside)}"
    return None


def unchanged(view: View) -> Iterator[Fact]:
    """State that is what it was a step before, all of it or a block."""
    if view.phase not in ("moment1", "moment2", "slot", "update") or view.sides is None:
        return
    before = (np.zeros_like(view.sides[0]),) * 2
    if view.phase != "update":
        earlier = view.step - 1 if view.step > view.pair.first_step else 0
        before = view.both(view.phase, view.tensor, earlier) or before
    for (name, side, other), own, others in zip(view.named_sides(), before, before[::-1], strict=True):
        same, moved = side == own, other != others
        if view.phase != "update" and same.all() and moved.any():
            yield Fact("unchanged", f"{view.tensor} is in {name} what it was a step before")
        elif side.ndim == 2 and (block := _block(same, moved)):
            yield Fact("unchanged-block", f"{block} are in {name} what they were a step before")


def rounded(view: View) -> Iterator[Fact]:
    """Which side's numbers have few digits, and a difference of the size of a rounding."""
    if view.sides is None or view.phase in ("batch", "tokens"):
        return
    width = width_of(view)
    for name, side, other in view.named_sides():
        if np.unique(side[side != 0]).size < ENOUGH:
            continue
        if short(side, BF16_BITS) >= ALL and short(other, BF16_BITS) <= FEW:
            yield Fact("bf16-numbers", f"{name} has bfloat16 numbers only, the other side has not")
            return
        for scale in (1.0, float(max(view.targets(), 1))):
            if (
                short(side * scale, SUM_BITS[width]) >= MOST_OF
                and short(other * scale, SUM_BITS[width]) <= FEW
            ):
                words = (
                    f"{name} has numbers of at most {SUM_BITS[width]} bits, as sums of bfloat16 numbers have"
                )
                yield Fact("sums-of-bf16", words)
                return
        if width == 8 and short(side, FP32_BITS) >= ALL and short(other, FP32_BITS) <= FEW:
            yield Fact("fp32-numbers", f"{name} has float32 numbers only, the other side has not")
            return


def size(view: View) -> Iterator[Fact]:
    """A difference that is small, or of the size of a rounding and as irregular."""
    if view.sides is None or view.phase in ("batch", "tokens") or view.sides[0].size < ENOUGH:
        return
    left, right = view.sides
    apart, whole = float(np.linalg.norm(right - left)), float(np.linalg.norm(left))
    share = apart / whole if whole else math.inf
    if 0.0 < share <= SMALL:
        yield Fact("small", f"the difference is {share:.1e} of the tensor")
    if ROUNDING[0] <= share <= ROUNDING[1]:
        related = abs(float(np.sum((right - left) * left))) / (apart * whole)
        if related <= UNRELATED:
            yield Fact(
                "like-rounding",
                f"the difference is irregular and {share:.1e} of the tensor, like a rounding to bfloat16",
            )


def width_of(view: View) -> int:
    """How many bytes the run's numbers have: 8 or 4."""
    sides = (
        view.raw if view.phase not in SCALAR_TENSORS else view.pair.read(view.step, "activation", "logits")
    )
    return 4 if any(side is not None and side.dtype.itemsize < 8 for side in sides) else 8


def short(array: Array, bits: int) -> float:
    """The share of the numbers, zeros left out, that have at most so many binary digits."""
    mantissa, _ = np.frexp(array[array != 0])
    if not mantissa.size:
        return 0.0
    scaled = mantissa * 2.0**bits
    return float(np.mean(np.abs(scaled - np.round(scaled)) <= 2.0 ** (bits - 46)))


def layout(view: View) -> Iterator[Fact]:
    """A transposed weight, or one whose rows are in another order."""
    if (
        view.sides is None
        or view.sides[0].ndim != 2
        or view.phase not in (*WEIGHT_SHAPED, "initial", "resume")
    ):
        return
    left, right = view.sides
    near = max(view.allowed, 1e-6 * float(np.abs(left).max(initial=0.0)))
    if left.shape[0] == left.shape[1] and np.abs(left.T - right).max() <= near:
        yield Fact("transposed", "one is the other's transpose")
        return
    one, other = (side[np.lexsort(side.T[::-1])] for side in (left, right))
    if len(left) > 1 and np.unique(one, axis=0).shape[0] > 1 and np.abs(one - other).max() <= near:
        yield Fact("rows-moved", "one side's rows are the other's in another order")


def remainder(view: View) -> Iterator[Fact]:
    """What the difference is a multiple of: the weight, the gradient, the sign of the first moment."""
    if view.sides is None or view.phase not in (*WEIGHT_SHAPED, "slot") or view.sides[0].size < ENOUGH // 4:
        return
    name = view.tensor.partition("/")[2] if view.phase == "slot" else view.tensor
    apart = view.sides[1] - view.sides[0]
    columns: list[tuple[str, str, Array]] = []
    if name in (weights := view.pair.weights(view.step)):
        columns.append(("adds-weight", "the weight", weights[name][0]))
    if view.phase != "gradient" and (gradient := view.both("gradient", name)):
        columns.append(("adds-gradient", "the gradient", gradient[0]))
    if view.phase == "update" and (moment := view.both("moment1", name)):
        columns.append(("adds-sign", "the sign of the first moment", np.sign(moment[0])))
    for kind, words, column in columns:
        size = float(np.sum(column**2)) if column.shape == apart.shape else 0.0
        times = float(np.sum(apart * column)) / size if size else 0.0
        rest = float(np.linalg.norm(apart - times * column))
        if times and rest <= MAX_RESIDUAL * float(np.linalg.norm(apart)):
            yield Fact(kind, f"right - left is {times:.6g} times {words}")
