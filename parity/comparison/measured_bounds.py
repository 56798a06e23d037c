"""The bounds of `parity check` in fp32: each side is held to a float64 reference that starts every step where it stands.

forward and backward pass: measured. `parity.runs.replay` makes every step of each side again in float64, and for the left
           side also from weights that are moved by one rounding each. With σ the measured movement of an element,

               bound = C · T(N) · U(ν) · σ

           σ  of element (i, j) of a tensor folded to [rows, columns]: the root of rows_i · columns_j / mean, the
              product form of its mean squares, but not less than the tensor's own root mean square. Where a whole row
              or column does not move at all (a token that is absent, a padded position) nothing may differ.
           C  how much more a run rounds than a draw: it rounds every product, sum and stored value, a draw every
              weight once. C² = (roundings on the path, `path_roundings`) / (weights on the path), each rounding counted
              at its largest, as the draws' are. Forward the loss and activations, forward and backward the rest.
           T  the largest of N normal errors, but for one case in a million.
           A tensor is also held as a whole, its distance from the reference (Frobenius norm) to C · V · U · |σ|: the
           squared distance has INDEPENDENT ways or more, and is above its mean by V² in one case in a million.
           U  what σ may be too small by, since it comes from few draws: χ² with ν degrees of freedom is below its mean
              by U² in one case in a million. Per draw the elements of a tensor move in at least INDEPENDENT ways.

loss       the same, ν = one per draw and step (the larger of the step's σ and that of all steps), and the rounding of
           one sum over the targets: T · u · sqrt(1 + n/2) · loss.
gradient norm, clip factor, moments, update: computed in numpy float64 from the side's own gradient, moments and
           weights by the recipe's rule (`adam.AdamRule`), so nothing but this phase's few roundings is left.
           An element is undetermined where its first moment is within reach of its gradient's bound: there Adam makes
           a whole step of noise, and the two sides may step apart, each rightly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from parity.comparison.adam import AdamRule, clip_condition, float64_sides, gradient_and_before, shown_factors
from parity.comparison.estimated_bounds import (
    FALSE_ALARM,
    INDEPENDENT,
    MOMENT_ROUNDINGS,
    SMALLEST,
    RoundingBounds,
    path_roundings,
    tail,
    too_large,
)
from parity.comparison.pair import Pair, as_float64
from parity.comparison.phases import CLIP, Place
from parity.comparison.tolerance import (
    EXACT_PHASES,
    SAME_DOUBLE,
    UNIT,
    WEIGHT_ROUNDINGS,
    Bound,
    Contrast,
    as_a_whole,
    largest,
)
from trainspec.plans.plan import Policy
from trainspec.trace import Trace

Array = NDArray[Any]
# Roundings of an update at its own size (a side): both bias corrections and their quotients 4, root, eps, quotient,
# rate 4, and 1 where the two weights are subtracted to record it.
UPDATE_ROUNDINGS = 9
NAMES = (("left", "fp64 from left"), ("right", "fp64 from right"))
OWN_NAMES = (("left", "its own rule"), ("right", "its own rule"))


@dataclass(frozen=True)
class Measurement:
    """What `parity.runs.replay` left: a reference for each run, and how far the first one's tensors move."""

    references: tuple[Trace, ...]
    movement: Path
    draws: int

    def mean_squares(self, step: int, key: str) -> tuple[Array, Array]:
        """Of the rows and of the columns of a folded tensor, over all draws; no number where a draw did not get there."""
        path = self.movement / f"step-{step:06d}.safetensors"
        if not path.is_file():
            return np.full(1, np.nan), np.full(1, np.nan)
        with safe_open(path, "numpy") as file:
            return file.get_tensor(f"{key}/rows"), file.get_tensor(f"{key}/columns")

    def sigma(self, step: int, key: str, shape: tuple[int, ...]) -> Array:
        """The movement of every element, see the head of this file."""
        rows, columns = self.mean_squares(step, key)
        mean = rows.mean()
        if not mean or not math.isfinite(mean):
            return np.full(shape, mean)
        product = np.outer(rows, columns / mean)
        return np.sqrt(np.where(product > 0, np.maximum(product, mean), 0.0)).reshape(shape)

    def loss_sigma(self, step: int) -> float:
        """The movement of the mean loss: the step's own, or that of all steps where it is larger."""
        steps = range(1, 1 + len(self.references[0].steps))
        squares = {each: float(self.mean_squares(each, "loss")[0][0]) for each in steps}
        return math.sqrt(float(np.maximum(squares.get(step, math.nan), np.mean(list(squares.values())))))


@dataclass(frozen=True)
class Sums:
    """How gradients are added up: the type that the recipe asks for, and how many of them each side makes one of."""

    asked: Policy = "fp32"
    summands: tuple[int, int] = (1, 1)


class MeasuredBounds:
    """Each side against its reference, with the unit roundoff of what both compute in."""

    notes = ()

    def __init__(
        self,
        pair: Pair,
        precision: Literal["fp32", "bf16"],
        *,
        measurement: Measurement,
        rule: AdamRule,
        sums: Sums,
    ) -> None:
        self._pair, self.measurement, self._rule, self._sums = pair, measurement, rule, sums
        self._unit = UNIT[precision]
        self._summed = UNIT["fp32"]
        shapes = pair.starting_shapes()
        rows = pair.read(1, "batch", "input_ids")[0]
        forward, whole = path_roundings(
            shapes,
            rows.shape if rows is not None and rows.ndim == 2 else (1, 1),
            structure=pair.structure,
            stored=self._unit,
            summed=self._summed,
        )
        uses = len(shapes) * self._unit**2
        self.forward, self.whole = math.sqrt(forward / uses), math.sqrt(whole / (2 * uses))
        self._coarse = RoundingBounds(pair, precision)
        self._gradient_bound = cache(self._measured_bound)
        self._factors = cache(self._factors_at)

    def refuses(self, place: Place, left: Array, right: Array) -> str | None:
        """A gradient that one side alone summed in bfloat16 where more was asked: no bound of bf16 would see it.

        One of 65536 float32 numbers is a bfloat16 number. A single gradient, not a sum, may be all made of them.
        """
        if place.phase != "gradient" or self._sums.asked == "bf16":
            return None
        narrow = [_is_bfloat16(side) for side in (left, right)]
        if all(narrow) or not any(narrow):
            return None
        side = narrow.index(True)
        if self._sums.summands[side] == 1 or not np.any((left, right)[side]):
            return None
        return (
            f"summed in bfloat16: every element in {NAMES[side][0]} is a bfloat16 number, "
            f"the recipe says precision.reduce={self._sums.asked}"
        )

    def contrasts(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        """See the head of this file, phase by phase."""
        match place.phase:
            case phase if phase in EXACT_PHASES:
                return self._coarse.contrasts(place, left, right)
            case "lr":
                return self._rate(place, left, right)
            case "loss":
                return self._loss(place, left, right)
            case "grad_norm":
                return self._norm(place.step, left, right)
            case phase if phase == CLIP:
                return self._clip(place.step)
            case "moment1" | "moment2":
                return self._moment(place, left, right)
            case "update":
                return self._update(place, left, right)
            case _:
                return self._against_reference(place, left, right)

    def multiple(self, *, forward: bool, size: int, freedom: int) -> float:
        """C · T · U."""
        return (self.forward if forward else self.whole) * tail(size) * too_small(freedom)

    def _reference(self, step: int) -> tuple[Trace, Trace] | None:
        left, right = self.measurement.references
        return (left, right) if min(len(left.steps), len(right.steps)) >= step else None

    def _against_reference(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        references, key = self._reference(place.step), f"{place.phase}/{place.tensor}"
        if references is None or any(key not in trace.names(place.step) for trace in references):
            return self._coarse.contrasts(place, left, right)
        own, whole = Bound(self._gradient_bound(place).reshape(left.shape)), Bound(self._whole_bound(place))
        expected = [trace.read(place.step, key).reshape(left.shape) for trace in references]
        each = list(zip((left, right), expected, NAMES, strict=True))
        return [
            *(Contrast(side, wanted, own, names) for side, wanted, names in each),
            *(as_a_whole(side, wanted, whole, names) for side, wanted, names in each),
        ]

    def _measured_bound(self, place: Place) -> Array:
        key = f"{place.phase}/{place.tensor}"
        shape = self.measurement.references[0].read(place.step, key).shape
        sigma = self.measurement.sigma(place.step, key, shape)
        freedom = INDEPENDENT * self.measurement.draws
        forward = place.phase == "activation"
        return self.multiple(forward=forward, size=sigma.size, freedom=freedom) * sigma + SMALLEST

    def _whole_bound(self, place: Place) -> Array:
        """C · V · U · σ of the tensor as a whole."""
        key = f"{place.phase}/{place.tensor}"
        shape = self.measurement.references[0].read(place.step, key).shape
        rows = self.measurement.mean_squares(place.step, key)[0]
        size = math.prod(shape)
        more = self.forward if place.phase == "activation" else self.whole
        wide = too_large(INDEPENDENT) * too_small(INDEPENDENT * self.measurement.draws)
        return np.asarray(more * wide * math.sqrt(size * rows.mean()) + SMALLEST * math.sqrt(size))

    def _loss(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        """A reference that ended before this step gave no finite loss from weights that the run itself could use.

        That is no gap to be filled by an estimate: it stands there as not a number, which fails.
        """
        row = place.step - 1
        rows = [trace.steps[row] if row < len(trace.steps) else None for trace in self.measurement.references]
        freedom = self.measurement.draws * len(self.measurement.references[0].steps)
        tokens = max(self._pair.scalar(place.step, "tokens"))
        mean = max((abs(found["loss"]) for found in rows if found), default=0.0)
        own = self.multiple(forward=True, size=1, freedom=freedom) * self.measurement.loss_sigma(place.step)
        own += tail(1) * self._summed * math.sqrt(1 + tokens / 2) * mean
        own *= tokens if place.tensor == "loss_sum" else 1
        expected = [np.asarray(found[place.tensor] if found else np.nan) for found in rows]
        return [
            Contrast(side, wanted, Bound(np.asarray(own)), names)
            for side, wanted, names in zip((left, right), expected, NAMES, strict=True)
        ]

    def _rate(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        bound = Bound(np.asarray(SAME_DOUBLE * largest(left, right)))
        references = self._reference(place.step)
        if references is None:
            return [Contrast(left, right, bound)]
        wanted = np.asarray(references[0].steps[place.step - 1]["lr"])
        return [
            Contrast(side, wanted, bound, (n, "recipe")) for side, n in ((left, "left"), (right, "right"))
        ]

    def _norm(self, step: int, left: Array, right: Array) -> Sequence[Contrast]:
        """The root of the sum of squares of the side's own gradients: one long sum."""
        found = []
        for side, (reported, names) in enumerate(zip((left, right), OWN_NAMES, strict=True)):
            squares = 0.0
            for name in self._pair.names(step, "gradient"):
                gradient = self._pair.read(step, "gradient", name)[side]
                if gradient is not None:
                    squares += float(np.sum(np.square(as_float64(gradient))))
            norm = math.sqrt(squares)
            own = self._norm_rounding(step) * norm + SMALLEST
            found.append(Contrast(reported, np.asarray(norm), Bound(np.asarray(own)), names))
        return found

    def _norm_rounding(self, step: int) -> float:
        """The relative error of the norm: a sum over the largest tensor is the longest."""
        largest_sum = max(
            (_size(self._pair, step, name) for name in self._pair.names(step, "gradient")), default=1
        )
        return self._summed * math.sqrt(1 + largest_sum / 2)

    def _clip(self, step: int) -> Sequence[Contrast]:
        """The factor that a side's moments show; where they show no factor at all they are judged as moments.

        A backend may clip by a norm of its own (DeepSpeed does), which is rounded like the one it reports.
        """
        norms = self._pair.scalar(step, "grad_norm")
        wanted = np.array([self._rule.clip_factor(norm) for norm in norms])
        summed = np.where(wanted < 1, self._norm_rounding(step), 0.0)
        own = MOMENT_ROUNDINGS["moment1"] / 2 * self._summed * clip_condition(self._pair, step)
        allowed = (own + summed) * wanted
        shown, factor = shown_factors(self._pair, step, betas=self._rule.spec.betas), wanted
        if shown is not None:
            within = np.abs(shown.factor - wanted) <= allowed
            factor = np.where(within | shown.explain(wanted), shown.factor, wanted)
        return [
            Contrast(
                np.asarray(factor[i]), np.asarray(wanted[i]), Bound(np.asarray(allowed[i])), OWN_NAMES[i]
            )
            for i in range(2)
        ]

    def _factors_at(self, step: int) -> list[float]:
        """Each side's clip factor: what its moments show where that is within bounds, or else the rule's."""
        return [
            float(c.first if abs(c.first - c.second) <= c.bound.own else c.second) for c in self._clip(step)
        ]

    def _moment(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        gradient, before = gradient_and_before(self._pair, place)
        roundings, found = MOMENT_ROUNDINGS[place.phase] / 2 * self._summed, []
        for side, factor in enumerate(self._factors(place.step)):
            wanted, size = self._rule.moment(place.phase, gradient[side], before[side], factor=factor)
            bound = Bound(roundings * size + SMALLEST)
            found.append(Contrast((left, right)[side], wanted, bound, OWN_NAMES[side]))
        return found

    def _update(self, place: Place, left: Array, right: Array) -> Sequence[Contrast]:
        moment1 = float64_sides(self._pair.read(place.step, "moment1", place.tensor), left)
        moment2 = float64_sides(self._pair.read(place.step, "moment2", place.tensor), left)
        weights = self._pair.weights(place.step).get(place.tensor, (np.zeros(left.shape),) * 2)
        lr = max(self._pair.scalar(place.step, "lr"))
        noise, found = self._noise(place, moment1), []
        for side, names in enumerate(OWN_NAMES):
            wanted = self._rule.update(
                place.tensor, weights[side], moment1[side], moment2[side], lr=lr, step=place.step
            )
            size = np.abs(weights[side]) + np.abs(wanted)  # of the weight before and after
            own = UPDATE_ROUNDINGS * np.abs(wanted) + WEIGHT_ROUNDINGS * size
            bound = Bound(self._summed * own + SMALLEST)
            found.append(Contrast((left, right)[side], wanted, bound, names, noise))
        return found

    def _noise(self, place: Place, moment1: Array) -> Array:
        """Elements whose gradient's bound reaches the first moment."""
        gradient = Place(place.step, "gradient", place.tensor)
        if self._reference(place.step) is None:
            return np.zeros(moment1.shape[1:], bool)
        if f"gradient/{place.tensor}" not in self.measurement.references[0].names(place.step):
            return np.zeros(moment1.shape[1:], bool)
        beta, factor = self._rule.spec.betas[0], max(self._factors(place.step))
        reach = (1.0 - beta) * factor * self._gradient_bound(gradient)
        reach = reach.reshape(moment1.shape[1:])
        size = np.abs(moment1).max(axis=0)
        # A gradient that cannot move at all (of A, while B is zero) leaves no noise, nor does one that is exactly zero on
        # both sides (after a ReLU): Adam makes no step of it.
        return (reach >= size) & (reach > SMALLEST) & (size > 0)


def _is_bfloat16(array: Array) -> bool:
    """Whether every element is a bfloat16 number."""
    return bool(np.all(array.astype(ml_dtypes.bfloat16).astype(np.float64) == array.astype(np.float64)))


def too_small(freedom: int) -> float:
    """By what factor a root mean square of `freedom` normal values may come out too small, once in a million.

    P(χ² ≤ x) ≤ (x/2)^(ν/2) / Γ(ν/2 + 1), from the incomplete gamma function's series; solved for x.
    """
    half = freedom / 2
    return math.sqrt(half) * math.exp(-(math.log(FALSE_ALARM) + math.lgamma(half + 1)) / freedom)


def _size(pair: Pair, step: int, name: str) -> int:
    return max(side.size for side in pair.read(step, "gradient", name) if side is not None)
