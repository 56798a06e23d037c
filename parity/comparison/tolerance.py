"""How far two traces may differ at each location, and why.

`Bounds` is the interface: for a location and its two arrays it says what is compared with what, and how large the
difference may be. `ProofBounds` is for fp64. For fp32 and bf16, `measured_bounds.MeasuredBounds` holds each side to a
float64 reference; `estimated_bounds.EstimatedBounds` compares two traces without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import Pair, as_float64
from parity.comparison.phases import INITIAL_GROUPS, Location
from trainspec.plans.plan import Policy

Array = NDArray[Any]

# Rounding moves a float64 run by about 1e-15 of a tensor's largest entry (measured on both backends: gradients
# within 3e-15), the mildest known difference of algorithm by 1e-6. The bound lies half-way between the two.
FP64_TOLERANCE = 1e-9

# Unit roundoff (half the distance from 1 to the next number) of the type that a policy computes in. In bf16, sums and
# stored state (master weights, moments) have fp32's.
UNIT: dict[Policy, float] = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8}
# XLA flushes numbers below this to zero, torch keeps them.
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
# Roundings at the size of the weight in one side's update: the factor 1 - lr · decay, its product with the weight, the sum
# with Adam's step.
WEIGHT_ROUNDINGS = 3

# Roundings of a sum over a batch of some thousand elements, at the size of the largest entry, of both sides.
STATISTIC_ROUNDINGS = 64

# The learning rate is computed once, in double precision, by the same Python: 4 units in the last place.
SAME_DOUBLE = 1e-15
# An optax schedule computes in float32, under x64 too: 4 units in the last place of that.
SAME_SINGLE = 4 * UNIT["fp32"]
# By how much a difference of rates may have grown in what follows from it.
RATE_GROWTH = 10.0
# Phases before the rate of a step.
BEFORE_RATE = (
    "batch",
    "tokens",
    "activation",
    "loss",
    "activation_gradient",
    "gradient",
    "grad_norm",
    "clip",
)
# State that a program may keep in a narrower type than it computes in.
STORED_PHASES = ("moment1", "moment2", "slot", "change")

# The largest share of a gradient's or update's elements whose bounds may reach their own size. At one half the median
# element is still determined, so an error as large as the elements shows in most of them. Clean fp32 runs stay below one
# in a thousand. If more elements are undetermined, the tensor still counts as tested when the bound on its whole, or on what it
# is along itself, is below this share of its norm: an error as large as the tensor would exceed it.
DETERMINED = 0.5

# What must be equal: the data, the number of target tokens, and what the runs start from.
EXACT_PHASES = (*INITIAL_GROUPS, "batch", "tokens")


@dataclass(frozen=True)
class Bound:
    """How far apart two arrays may be: what is `inherited` from earlier, already judged differences, plus the phase's `own`.

    Both are absolute and broadcast to the arrays' shape. The sum is the bound; `bound_used` is the share of `own` that
    the error beyond `inherited` takes.
    """

    own: Array
    inherited: Array | float = 0.0


@dataclass(frozen=True)
class CheckedPair:
    """Two arrays of one location and how far apart they may be; `names` says whose they are."""

    first: Array
    second: Array
    bound: Bound
    names: tuple[str, str] = ("left", "right")
    # Mask of the elements that consist of rounding noise; None means those whose bound reaches their own size.
    undetermined: Array | None = None
    # For a tensor as a whole (`as_a_whole`, `along_itself`): its norm; distance and bound are reported as shares of it.
    norm: float | None = None
    # How it is looked at, as a message says it.
    way: str = "element by element"


def as_a_whole(
    first: Array, second: Array, bound: Bound, names: tuple[str, str] = ("left", "right")
) -> CheckedPair:
    """The distance of two tensors (Frobenius norm) as one number, so its bound needs no margin for the worst of many.

    Under coarse rounding a bound on the worst element is as large as most elements; this one is not.
    """
    norm = float(max(np.linalg.norm(first), np.linalg.norm(second)))
    distance = np.asarray(np.linalg.norm(first - second))
    return CheckedPair(distance, np.zeros(()), bound, names, norm=norm, way="as a whole")


def along_itself(side: Array, wanted: Array, bound: Bound, names: tuple[str, str]) -> CheckedPair:
    """How far `side` is from `wanted` along `wanted`'s own direction, as one number.

    Rounding goes in all directions and moves it little in this one; a tensor that is missing, scaled or another one altogether is
    off by a large share of its norm. What is added at right angles does not show.
    """
    distance = np.abs(component_along(side - wanted, wanted))
    norm = float(np.linalg.norm(wanted))
    return CheckedPair(distance, np.zeros(()), bound, names, norm=norm, way="along itself")


def component_along(moved: Array, tensor: Array) -> Array:
    """The component of a movement in the direction of the tensor, a number; 0 where the tensor is zero."""
    norm = np.linalg.norm(tensor)
    return np.asarray(np.sum(moved * tensor) / norm if norm else 0.0)


class Bounds(Protocol):
    """Says what is compared at a location, and how far apart it may be. Locations come in causal order, each once."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about how the bounds were made."""
        ...

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """Why the two arrays, in the types of the traces, cannot be compared; None if they can."""
        ...

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Iterable[CheckedPair]:
        """The pairs that must agree, one after the other; the worst of them is the location's result.

        `left` and `right` are in float64, of equal shape, and not changed.
        """
        ...


class ProofBounds:
    """fp64: 1e-9 of the tensor's largest entry for every loss, gradient, moment and update, at every step.

    The bound does not grow with the step: at 1e-15 per step, drift stays below it for as long as a check runs.
    An update is the difference of two stored weights, and each side rounds it three times at the size of the weight
    (1 - lr · decay, its product, the sum). These 6 u |weight| are added; they matter where an update is tiny beside its
    weight (decay alone, the start of a warm-up). A running statistic that has settled changes by little of itself, and
    the statistic of the batch is rounded at its own size: `STATISTIC_ROUNDINGS`.

    An element whose gradient is rounding alone (a bias of keys that do not rotate, which adds the same to all scores of a query)
    has an update of rounding too, and Adam's quotient makes that larger than 1e-9 of the others: such an element owes its update
    to what it is made of, in the proportion in which the sides differ there (`_owed`).
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._gaps = [_excused_gap(*pair.scalar(step, "lr")) for step in pair.step_numbers]

    @property
    def notes(self) -> Sequence[str]:
        """That a rate of single precision widens the bounds, if it does."""
        if not any(self._gaps):
            return ()
        tolerance = self._tolerance(self._pair.step_numbers[-1], "update")
        return (
            f"one side computes its learning rate in float32, so that bounds are at {tolerance:.1e} instead of "
            f"{FP64_TOLERANCE:.0e} once the rates differ; compute the schedule in double precision for the full proof",
        )

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """Floating-point types narrower than float64 are not compared.

        A batch is, to the last bit, and so is the state that both sides keep in one narrower type.
        """
        if location.phase == "batch" or (location.phase in STORED_PHASES and left.dtype == right.dtype):
            return None
        sides = (("left", left), ("right", right))
        coarse = [f"{side.dtype} in {name}" for name, side in sides if _is_coarse(side)]
        return f"{' and '.join(coarse)}: fp64 wants float64" if coarse else None

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        """Left against right."""
        return (CheckedPair(left, right, self.bound(location, left, right)),)

    def bound(self, location: Location, left: Array, right: Array) -> Bound:
        """Zero, `SAME_DOUBLE` or `FP64_TOLERANCE`, times the largest entry of either side."""
        # Two runs that resumed start from what each made of the steps before, which is held to the same 1e-9.
        is_result = location.phase in INITIAL_GROUPS and self._pair.first_step > 1
        is_exact = location.phase in EXACT_PHASES and not is_result
        if is_exact or is_counter(self._pair, location):
            return Bound(np.zeros(()))
        if location.phase == "lr":
            return Bound(np.asarray(rate_tolerance(float(left), float(right)) * largest(left, right)))
        own = np.asarray(self._tolerance(location.step, location.phase) * largest(left, right))
        if location.phase not in ("update", "change"):
            return Bound(own)
        weights = self._pair.weights(location.step).get(location.tensor, (np.zeros(()), np.zeros(())))
        own = own + 2 * WEIGHT_ROUNDINGS * UNIT["fp64"] * np.maximum(*np.abs(weights))
        if location.phase == "change":
            own = own + STATISTIC_ROUNDINGS * UNIT["fp64"] * largest(*weights)
            return Bound(own)
        return Bound(own, self._owed(location, left, right))

    def _owed(self, location: Location, left: Array, right: Array) -> Array:
        """What each element of an update owes to differences of what it is made of: of moments, or else of gradient and slots.

        The product of its size and their relative differences, at most all of it. Those have been judged before.
        """
        step, name = location.step, location.tensor
        made_of = [("moment1", name), ("moment2", name)]
        if not all(any(self._pair.forms(step, *each)) for each in made_of):
            made_of = [("gradient", name), *(("slot", slot) for slot in self._pair.slots(step, name))]
        apart = np.zeros(left.shape)
        for group, tensor in made_of:
            sides = self._pair.read(step, group, tensor)
            if any(side is None or side.shape != left.shape for side in sides):
                continue
            one, other = (as_float64(side) for side in sides if side is not None)
            distance, smaller = np.abs(one - other), np.minimum(np.abs(one), np.abs(other))
            apart += np.divide(distance, smaller, out=(distance > 0).astype(np.float64), where=smaller > 0)
        return np.minimum(apart, 1.0) * (np.abs(left) + np.abs(right))

    def _tolerance(self, step: int, phase: str) -> float:
        made = step - self._pair.first_step + (phase not in BEFORE_RATE)
        gaps = self._gaps[:made]
        return FP64_TOLERANCE + RATE_GROWTH * max(gaps, default=0.0)


def rate_tolerance(left: float, right: float) -> float:
    """How far two rates may be apart: a rate that is a float32 number was computed in that type."""
    single = any(float(np.float32(rate)) == rate for rate in (left, right))
    return SAME_SINGLE if single else SAME_DOUBLE


def rate_gap(left: float, right: float) -> float:
    """The relative difference of two rates."""
    return abs(left - right) / max(abs(left), abs(right)) if left != right else 0.0


def _excused_gap(left: float, right: float) -> float:
    """The relative difference of two rates that single precision explains; 0 for one that fails by itself."""
    gap = rate_gap(left, right)
    return gap if SAME_DOUBLE < gap <= rate_tolerance(left, right) else 0.0


def is_counter(pair: Pair, location: Location) -> bool:
    """Whether it is a change of integers, or a slot of them, which have no rounding."""
    if location.phase not in ("change", "slot"):
        return False
    sides = pair.forms(location.step, location.phase, location.tensor)
    return all(side is None or side.dtype.startswith(("int", "uint")) for side in sides)


def _is_coarse(array: Array) -> bool:
    """Whether it is a floating-point type narrower than float64 (bfloat16 has numpy's kind V)."""
    return array.dtype.kind not in "iu" and array.dtype != np.float64


def largest(left: Array, right: Array) -> float:
    """The largest magnitude in either array; 0 if both are empty."""
    return max(_size(left), _size(right))


def _size(array: Array) -> float:
    """The largest magnitude, without an array of magnitudes."""
    return abs(float(max(array.max(initial=0.0), -array.min(initial=0.0))))
