"""How far two traces may stand apart, location by location, and why.

`Bounds` is the interface: anything that says, for a location and the two arrays found there, what is compared with what
and how large the difference may be. `ProofBounds` here is fp64's. For fp32 and bf16 `measured.MeasuredBounds` holds
each side to a float64 reference; `rounding.RoundingBounds` compares two traces that nothing more is known of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import Pair
from parity.comparison.phases import Location
from trainspec.plans.plan import Policy

Array = NDArray[Any]

# Rounding moves a float64 run by about 1e-15 of a tensor's largest entry (measured on both backends: gradients
# within 3e-15), the mildest known difference of algorithm by 1e-6: the bound stands half-way between the two.
FP64_TOLERANCE = 1e-9

# Unit roundoff, half the distance from 1 to the next number, of the type that a policy computes with. What bf16 sums and
# keeps (master weights, moments) has fp32's.
UNIT: dict[Policy, float] = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8}
# How often a side rounds at the size of the weight when it updates it: the factor 1 - lr · decay, its product with the
# weight, the sum with Adam's step.
WEIGHT_ROUNDINGS = 3

# The learning rate is computed once, in double precision, by the same Python: 4 units in the last place.
SAME_DOUBLE = 1e-15

# What must not differ at all: the data, the count of targets, and the weights that training starts from.
EXACT_PHASES = ("initial", "batch", "tokens")


@dataclass(frozen=True)
class Bound:
    """How far apart two arrays may be: `handed` on by earlier, already judged differences, plus the phase's `own`.

    Both are absolute and broadcast to the arrays' shape. The sum decides; the share of `own` that is used up by
    what goes beyond `handed` is what is told as `bound_used`.
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
    # Elements that say nothing: what they are made of is rounding noise. None: those whose bound is their own size.
    undetermined: Array | None = None
    # For a tensor as a whole (`as_a_whole`): the norm that its distance and its bound are told as shares of.
    norm: float | None = None


def as_a_whole(
    first: Array, second: Array, bound: Bound, names: tuple[str, str] = ("left", "right")
) -> CheckedPair:
    """The distance of two tensors (Frobenius norm) against what it may be: one number, and so a bound without a tail.

    Where rounding is coarse a bound for the worst of all elements is as large as most of them; this one is not.
    """
    norm = float(max(np.linalg.norm(first), np.linalg.norm(second)))
    return CheckedPair(np.asarray(np.linalg.norm(first - second)), np.zeros(()), bound, names, norm=norm)


class Bounds(Protocol):
    """Says what is compared at `location`, and how far apart it may be.

    Locations are asked in causal order, each once. `notes` are what a user should know of how the bounds were made.
    """

    @property
    def notes(self) -> Sequence[str]:
        """See above."""
        ...

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """Why the two arrays are not compared at all: their types, as they stand in the traces; None where they are."""
        ...

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        """One or more pairs that must agree; the location is as good as the worst of them.

        Both arrays are float64 copies of equal shape.
        """
        ...


class ProofBounds:
    """fp64: 1e-9 of the tensor's largest entry for every loss, gradient, moment and update, at every step.

    The bound does not grow with the step: at 1e-15 a step, drift stays below it for as long as a check runs.
    An update is the difference of two stored weights, each side's rounded three times at the size of the weight
    (1 - lr · decay, its product, the sum): where an update is tiny beside its weight (decay alone, the start of a
    warm-up) these 6 u |weight| come on top.
    """

    notes = ()

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """Numbers of fewer bits than float64's."""
        sides = (("left", left), ("right", right))
        coarse = [f"{side.dtype} in {name}" for name, side in sides if _is_coarse(side)]
        return f"{' and '.join(coarse)}: fp64 wants float64" if coarse else None

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        """Left against right."""
        return (CheckedPair(left, right, self.bound(location, left, right)),)

    def bound(self, location: Location, left: Array, right: Array) -> Bound:
        """Zero, the learning rate's, or `PROOF`, times the largest entry of either side."""
        if location.phase in EXACT_PHASES:
            return Bound(np.zeros(()))
        factor = SAME_DOUBLE if location.phase == "lr" else FP64_TOLERANCE
        own = np.asarray(factor * largest(left, right))
        if location.phase == "update":
            weights = self._pair.weights(location.step).get(location.tensor, (np.zeros(()), np.zeros(())))
            own = own + 2 * WEIGHT_ROUNDINGS * UNIT["fp64"] * np.maximum(*np.abs(weights))
        return Bound(own)


def _is_coarse(array: Array) -> bool:
    """A type of fewer bits than float64 that is not an integer's (bfloat16 has numpy's kind V)."""
    return array.dtype.kind not in "iu" and array.dtype != np.float64


def largest(left: Array, right: Array) -> float:
    """The largest magnitude in either array; 0 for empty ones."""
    return float(max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0)))
