"""How far two traces may stand apart, place by place, and why.

`Bounds` is the interface: anything that says, for a place and the two arrays found there, what is compared with what
and how large the difference may be. `ProofBounds` here is fp64's. For fp32 and bf16 `measured.MeasuredBounds` holds
each side to a float64 reference; `rounding.RoundingBounds` compares two traces that nothing more is known of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parity.pair import Pair
from parity.phases import Place

Array = NDArray[Any]

# Rounding moves a float64 run by about 1e-15 of a tensor's largest entry (measured on both backends: gradients
# within 3e-15), the mildest known difference of algorithm by 1e-6: the bound stands half-way between the two.
PROOF = 1e-9

# Half the distance from 1 to the next float64, and how often a side rounds at the size of the weight when it
# updates it: the factor 1 - lr · decay, its product with the weight, the sum with Adam's step.
UNIT64 = 2.0**-53
WEIGHT_ROUNDINGS = 3

# The learning rate is computed once, in double precision, by the same Python: 4 units in the last place.
SAME_DOUBLE = 1e-15

# What must not differ at all: the data, the count of targets, and the weights that training starts from.
EXACT_PHASES = ("initial", "batch", "tokens")


@dataclass(frozen=True)
class Bound:
    """How far apart two arrays may be: `handed` on by earlier, already judged differences, plus the phase's `own`.

    Both are absolute and broadcast to the arrays' shape. The sum decides; how much of `own` is used up by what
    goes beyond `handed` is the headroom.
    """

    own: Array
    handed: Array | float = 0.0


@dataclass(frozen=True)
class Contrast:
    """Two arrays of one place and how far apart they may be; `names` says whose they are."""

    first: Array
    second: Array
    bound: Bound
    names: tuple[str, str] = ("left", "right")
    # Elements that say nothing: what they are made of is rounding noise. None: those whose bound is their own size.
    undetermined: Array | None = None


class Bounds(Protocol):
    """Says what is compared at `place`, and how far apart it may be.

    Both arrays are float64 copies of equal shape.
    Places are asked in causal order, each once. `float64_only` says that a coarser type is itself a failure.
    """

    float64_only: bool

    def contrasts(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        """One or more pairs that must agree; the place is as good as the worst of them."""
        ...


class ProofBounds:
    """fp64: 1e-9 of the tensor's largest entry for every loss, gradient, moment and update, at every step.

    The bound does not grow with the step: at 1e-15 a step, drift stays below it for as long as a check runs.
    An update is the difference of two stored weights, each side's rounded three times at the size of the weight
    (1 - lr · decay, its product, the sum): where an update is tiny beside its weight (decay alone, the start of a
    warm-up) these 6 u |weight| come on top.
    """

    float64_only = True

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def contrasts(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        """Left against right."""
        return (Contrast(left, right, self.bound(place, left, right)),)

    def bound(self, place: Place, left: Array, right: Array) -> Bound:
        """Zero, the learning rate's, or `PROOF`, times the largest entry of either side."""
        if place.phase in EXACT_PHASES:
            return Bound(np.zeros(()))
        factor = SAME_DOUBLE if place.phase == "lr" else PROOF
        own = np.asarray(factor * largest(left, right))
        if place.phase == "update":
            weights = self._pair.weights(place.step).get(place.tensor, (np.zeros(()), np.zeros(())))
            own = own + 2 * WEIGHT_ROUNDINGS * UNIT64 * np.maximum(*np.abs(weights))
        return Bound(own)


def largest(left: Array, right: Array) -> float:
    """The largest magnitude in either array; 0 for empty ones."""
    return float(max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0)))
