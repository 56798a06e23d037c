"""Updates and optimizer state of a rule that is not known: how far a difference of gradients can reach in them.

A trace names its optimizer's slots, but not its rule. So a bound is made for the most sensitive rule that the trace allows:

slot       2 (d + R - 1) (|slot| + |slot before|) + |Δ slot before|, with maxima of tensors: a square doubles the relative
           difference d of the gradient; R is the larger gradient norm divided by the smaller, as for a clip.
           Own: 20 u at that size, times sqrt(1 + n/2) for a slot that sums over n entries each (Adafactor's rows).
update     gain · (d + the slots' d + R - 1) · max|update|, in the gain's own rounding too: gain u max|update|.
           The gain is 4 where the update is a linear combination of gradient, slots and weight (SGD), which is fitted to
           the left side, and else that of Muon's Newton-Schulz iteration.
           |update| |Δg| / |g| per element: a root of a running square (Adafactor, RMSprop) follows a small element.
           Lion's update has the sign of b · slot before + (1 - b) · g, with b fitted to the left side; an element may
           have either where the sign's argument is within the differences of its terms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import Pair, as_float64
from parity.comparison.phases import Location
from parity.comparison.tolerance import FLOAT32_TINY, UNIT, WEIGHT_ROUNDINGS, Bound, largest, rate_gap

Array = NDArray[Any]

SLOT_ROUNDINGS = 20
LINEAR_GAIN = 4.0
# Five Newton-Schulz steps of 3.4445 x - 4.7750 x³ + 2.0315 x⁵ multiply a small singular value by 3.4445⁵ = 485.
# https://github.com/KellerJordan/Muon
ITERATION_GAIN = 500.0
# A linear fit leaves less than this share of the update.
LINEAR_REST = 1e-2
# The magnitudes of a sign's updates spread by less than this share; decay spreads them.
SIGN_SPREAD = 0.2
MIXTURES = tuple(i / 100 for i in range(101))
# The types of a slot that is stored coarser than it is computed; the roundoff unit of each.
STORED_UNIT = {"bfloat16": UNIT["bf16"], "float16": 2.0**-11}


def stored_unit(pair: Pair, location: Location) -> float:
    """The unit of the type that both sides store an array in, if it is coarser than float32; else 0."""
    sides = pair.forms(location.step, location.phase, location.tensor)
    return max(STORED_UNIT.get(side.dtype, 0.0) if side is not None else 0.0 for side in sides)


def other_types(location: Location, left: Array, right: Array) -> str | None:
    """Why two stored states cannot be compared: one side rounds them to a coarser type than the other."""
    types = str(left.dtype), str(right.dtype)
    if location.phase not in ("moment1", "moment2", "slot") or types[0] == types[1]:
        return None
    return f"{types[0]} in left, {types[1]} in right" if set(types) & set(STORED_UNIT) else None


def slot_bound(pair: Pair, location: Location, left: Array, right: Array, *, drift: float) -> Bound:
    """The bound of a slot under an unknown rule: see the module docstring. `drift` is that of the weights."""
    name = location.tensor.partition("/")[2]
    before = _sides(pair, location.step - 1, "slot", location.tensor, like=left)
    scale = largest(left, right) + largest(*before)
    gradient = pair.forms(location.step, "gradient", name)[0]
    terms = 1.0 if gradient is None or not left.size else math.prod(gradient.shape) / left.size
    moved = (
        2 * (_share(pair, location.step, "gradient", name) + clip_ratio(pair, location.step) + drift) * scale
    )
    own = SLOT_ROUNDINGS * UNIT["fp32"] * np.sqrt(1 + terms / 2) * scale
    stored = 2 * stored_unit(pair, location) * np.maximum(abs(left), abs(right))
    return Bound(own + stored + FLOAT32_TINY, moved + abs(before[0] - before[1]))


def update_bound(pair: Pair, location: Location, left: Array, right: Array) -> Bound:
    """The bound of an update under an unknown rule: see the module docstring."""
    step, name = location.step, location.tensor
    slots = pair.slots(step, name)
    apart = _share(pair, step, "gradient", name) + sum(_share(pair, step, "slot", slot) for slot in slots)
    apart += sum(2 * stored_unit(pair, Location(step, "slot", slot)) for slot in slots)
    size = largest(left, right)
    gradient = _sides(pair, step, "gradient", name, like=left)
    weights = pair.weights(step).get(name, (np.zeros(left.shape), np.zeros(left.shape)))
    columns = [gradient[0], weights[0], *(_sides(pair, step, "slot", slot, like=left)[0] for slot in slots)]
    gain = LINEAR_GAIN if _is_linear(left, columns) else ITERATION_GAIN
    smallest = np.minimum(abs(gradient[0]), abs(gradient[1]))
    follows = np.divide(
        abs(gradient[0] - gradient[1]), smallest, out=np.zeros(left.shape), where=smallest > 0
    )
    moved = gain * (apart + clip_ratio(pair, step)) * size
    moved = moved + np.minimum(2 * follows, 2.0) * np.maximum(abs(left), abs(right))
    moved = moved + _flips(pair, location, left, gradient, slots) * 2 * size
    rates = pair.scalar(step, "lr")
    moved = moved + max(rates) * abs(weights[0] - weights[1]) + rate_gap(*rates) * size
    own = gain * UNIT["fp32"] * size + WEIGHT_ROUNDINGS * UNIT["fp32"] * (abs(weights[0]) + abs(weights[1]))
    return Bound(own + FLOAT32_TINY, moved)


def has_moments(pair: Pair, step: int, name: str) -> bool:
    """Whether Adam's rule applies: both sides recorded both moments of a weight."""
    return all(side is not None for phase in ("moment1", "moment2") for side in pair.forms(step, phase, name))


def clip_ratio(pair: Pair, step: int) -> float:
    """The larger of the two gradient norms divided by the smaller, less 1."""
    norms = pair.scalar(step, "grad_norm")
    return max(norms) / min(norms) - 1.0 if min(norms) > 0 else 0.0


def _share(pair: Pair, step: int, group: str, name: str) -> float:
    """The largest difference of the two sides as a share of their largest entry."""
    left, right = pair.read(step, group, name)
    if left is None or right is None or left.shape != right.shape:
        return 0.0
    one, other = as_float64(left), as_float64(right)
    size = largest(one, other)
    return float(np.abs(one - other).max(initial=0.0)) / size if size else 0.0


def _sides(pair: Pair, step: int, group: str, name: str, *, like: Array) -> tuple[Array, Array]:
    """Both sides in float64; zeros before the first step and for an array that is not there or has another shape."""
    sides = pair.read(step, group, name) if step >= pair.first_step else (None, None)
    one, other = (
        np.zeros(like.shape) if side is None or side.shape != like.shape else as_float64(side)
        for side in sides
    )
    return one, other


def _is_linear(update: Array, columns: list[Array]) -> bool:
    """Whether an update is a linear combination of the columns; a tensor too small to tell counts as none."""
    if update.size < 4 * len(columns):
        return False
    matrix = np.stack([column.ravel() for column in columns], axis=1)
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(np.float64).tiny)
    factors = np.linalg.lstsq(matrix / scale, update.ravel(), rcond=None)[0]
    rest = np.linalg.norm(update.ravel() - matrix / scale @ factors)
    return bool(rest <= LINEAR_REST * np.linalg.norm(update))


def _flips(
    pair: Pair, location: Location, update: Array, gradient: tuple[Array, Array], slots: list[str]
) -> Array:
    """Where the update of a sign may have either sign: 1 there, 0 elsewhere and for any other rule."""
    sizes = np.abs(update[update != 0])
    if not sizes.size or np.std(sizes) > SIGN_SPREAD * np.mean(sizes):
        return np.zeros(update.shape)
    before = np.zeros((2, *update.shape))
    if slots:
        before = np.stack(_sides(pair, location.step - 1, "slot", slots[0], like=update))
    agreeing = [
        float(np.mean(np.sign(update) == -np.sign(_mix(b, before[0], gradient[0])))) for b in MIXTURES
    ]
    best = [b for b, share in zip(MIXTURES, agreeing, strict=True) if share >= max(agreeing)]
    mixture, spread = float(np.mean(best)), (max(best) - min(best)) / 2 + 0.005
    apart = _mix(mixture, abs(before[0] - before[1]), abs(gradient[0] - gradient[1]))
    apart = apart + spread * abs(before[0] - gradient[0])
    apart = apart + 4 * UNIT["fp32"] * _mix(mixture, abs(before[0]), abs(gradient[0]))
    return (abs(_mix(mixture, before[0], gradient[0])) <= apart).astype(np.float64)


def _mix(share: float, before: Array, gradient: Array) -> Array:
    return share * before + (1.0 - share) * gradient
