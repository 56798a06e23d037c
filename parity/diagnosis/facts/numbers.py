"""What the numbers are: zeros, roundings, what has not changed, what is left over when one is taken from the other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES
from parity.comparison.phases import SCALAR_TENSORS, WEIGHT_SHAPED
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.factors import MAX_RESIDUAL
from parity.diagnosis.view import Array, View

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
    width, is_small = width_of(view), _share(*view.sides) <= ROUNDING[1]
    for name, side, other in view.named_sides():
        if min(np.unique(each[each != 0]).size for each in (side, other)) < ENOUGH:
            continue
        if short(side, BF16_BITS) >= ALL and short(other, BF16_BITS) <= FEW:
            yield Fact("bf16-numbers", f"{name} has bfloat16 numbers only, the other side has not")
            return
        for scale in (1.0, float(max(view.targets(), 1))) if is_small else ():
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
    share = _share(left, right)
    if 0.0 < share <= SMALL:
        yield Fact("small", f"the difference is {share:.1e} of the tensor")
    if ROUNDING[0] <= share <= ROUNDING[1]:
        related = abs(float(np.sum((right - left) * left))) / (share * float(np.sum(left**2)))
        if related <= UNRELATED:
            yield Fact(
                "like-rounding",
                f"the difference is irregular and {share:.1e} of the tensor, like a rounding to bfloat16",
            )


def _share(left: Array, right: Array) -> float:
    """The difference as a share of the left side."""
    apart, whole = float(np.linalg.norm(right - left)), float(np.linalg.norm(left))
    return apart / whole if whole else math.inf


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


def other_layer(view: View) -> Iterator[Fact]:
    """A starting weight that is the other side's of another layer."""
    layer = view.layer(view.tensor)
    if view.phase != "initial" or view.sides is None or layer is None or view.sides[0].size < ENOUGH:
        return
    group = view.first.location.group
    for number in sorted({n for name in view.names if (n := view.layer(name)) is not None} - {layer}):
        both = view.both(group, view.tensor.replace(f".{layer}.", f".{number}.", 1))
        for at, name in enumerate(NAMES):
            if (
                both
                and both[1 - at].shape == view.sides[at].shape
                and np.array_equal(view.sides[at], both[1 - at])
            ):
                yield Fact(
                    "of-another-layer", f"{name}'s {view.tensor} is {NAMES[1 - at]}'s of layer {number}"
                )
                return


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
    if (
        view.phase == "gradient"
        and view.step > view.pair.first_step
        and (earlier := view.both("gradient", name, view.step - 1))
    ):
        columns.append(("adds-earlier-gradient", "the gradient of the step before", earlier[0]))
    if view.phase == "update" and (moment := view.both("moment1", name)):
        columns.append(("adds-sign", "the sign of the first moment", np.sign(moment[0])))
    for kind, words, column in columns:
        size = float(np.sum(column**2)) if column.shape == apart.shape else 0.0
        times = float(np.sum(apart * column)) / size if size else 0.0
        rest = float(np.linalg.norm(apart - times * column))
        if times and rest <= MAX_RESIDUAL * float(np.linalg.norm(apart)):
            yield Fact(kind, f"right - left is {times:.6g} times {words}")
