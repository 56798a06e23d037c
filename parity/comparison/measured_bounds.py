"""The bounds of `parity check` in fp32 and bf16: each side is held to a float64 reference of every step.

forward and backward pass: measured. `parity.runs.replay` repeats every step of each side in float64 from that side's own
           weights, and for the left side also with every result, every cotangent and every sum's partial sums rounded, up or
           down at random, by the root mean square of a rounding of the run's type (`jaxtrain.rounding`). So a rounding is
           made where the run makes it, and is amplified as the run's is. With σ the measured movement of an element,

               bound = T(N) · U(ν) · σ

           σ  of element (i, j) of a tensor folded to [rows, columns]: the root of rows_i · columns_j / mean, where rows
              and columns are mean squares, but at least the tensor's own root mean square, and the element's: a
              peak is no product of row and column. A row or column that does not move at all (an absent token, a padded position) must
              be equal.
           T  the largest of N normal errors exceeds T once in a million.
           U  σ comes from few draws and may be too small: χ² with ν degrees of freedom falls below its mean / U² once in
              a million. Each draw gives a tensor at least EFFECTIVE_DOF degrees of freedom.
           The tensor as a whole: its distance from the reference (Frobenius norm) is held to V · U · |σ|. The squared
           distance has at least EFFECTIVE_DOF degrees of freedom and exceeds V² times its mean once in a million.
           Along itself, where that bound is no smaller than half of a gradient: its distance in the reference's own direction is
           held to T · U(ν) · σ, σ² the larger of the movement's mean square in that direction and its share of the whole
           movement's in the mean over all gradients of the step, ν = draws · gradients.

loss       the same, ν = one per draw and step (the larger of the step's σ and that of all steps), and the rounding of
           one sum over the targets: T · u · sqrt(1 + n/2) · loss.
gradient norm, clip factor, moments, update: computed in numpy float64 from the side's own gradient, moments and
           weights by the recipe's rule (`adam.AdamRule`), so only this phase's few roundings remain.
           An element is undetermined if its first moment is within reach of its gradient's bound: there Adam turns
           noise into a whole step, and the two sides may rightly step apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from parity.comparison.adam import (
    MOMENTS,
    AdamRule,
    clip_condition,
    fit_factors,
    float64_side,
    side_and_before,
)
from parity.comparison.estimated_bounds import (
    EFFECTIVE_DOF,
    FALSE_ALARM,
    MOMENT_ROUNDINGS,
    EstimatedBounds,
    gaussian_max_quantile,
    rms_upper_factor,
)
from parity.comparison.pair import Pair, Sides, as_float64
from parity.comparison.phases import CLIP, Location
from parity.comparison.recent import HELD_BYTES, RecentArrays
from parity.comparison.tolerance import (
    DETERMINED,
    EXACT_PHASES,
    FLOAT32_TINY,
    SAME_DOUBLE,
    UNIT,
    WEIGHT_ROUNDINGS,
    Bound,
    CheckedPair,
    along_itself,
    as_a_whole,
    largest,
)
from trainspec.plans.plan import Policy
from trainspec.step import RMS_ROUNDING
from trainspec.trace import Trace

Array = NDArray[Any]
# One side's roundings of an update at its own size: both bias corrections and their quotients 4, root, eps, quotient and
# rate 4, and 1 for the subtraction of the two weights that records it.
UPDATE_ROUNDINGS = 9
NAMES = (("left", "fp64 from left"), ("right", "fp64 from right"))
# Elements that are not zero from which on it is no chance that sums in float32 are all bfloat16 numbers: 0.46^64 is 1e-21, which
# leaves room for elements that go together.
SUMMED_ELEMENTS = 64
_UNIT_OF_TYPE = {"float64": UNIT["fp64"], "float32": UNIT["fp32"], "bfloat16": UNIT["bf16"]}
OWN_NAMES = (("left", "its own rule"), ("right", "its own rule"))


class _Squares(NamedTuple):
    """Mean squares of a tensor's movement: along the tensor itself, and of the whole."""

    along: float
    whole: float


@dataclass(frozen=True)
class Measurement:
    """The output of `parity.runs.replay`: a reference for each run, and the movement of the first run's tensors."""

    references: tuple[Trace, ...]
    movement: Path
    draws: int

    def mean_squares(
        self, step: int, key: str, *kinds: Literal["rows", "columns", "elements", "along"]
    ) -> list[Array]:
        """Mean squares of the movement of a folded tensor's rows, columns or elements, or along itself, over all draws.

        NaN if a draw did not reach `step`.
        """
        path = self.movement / f"step-{step:06d}.safetensors"
        if not path.is_file():
            return [np.full(1, np.nan) for _ in kinds]
        with safe_open(path, "numpy") as file:
            return [file.get_tensor(f"{key}/{kind}") for kind in kinds]

    def sigma(self, step: int, key: str, shape: tuple[int, ...]) -> Array:
        """σ of every element, see the module docstring."""
        rows, columns, elements = self.mean_squares(step, key, "rows", "columns", "elements")
        mean = rows.mean()
        if not mean or not math.isfinite(mean):
            return np.full(shape, mean)
        squares = np.outer(rows, columns / mean)
        still = ~(squares > 0)
        np.maximum(squares, mean, out=squares)
        squares[still] = 0.0
        np.maximum(squares, elements, out=squares)
        return np.sqrt(squares, out=squares).reshape(shape)

    def along_sigma(self, step: int, key: str) -> float:
        """σ of a gradient along itself, see the module docstring."""
        own = self._squares_along(step, key)
        shares = [
            along / whole
            for along, whole in map(partial(self._squares_along, step), self.gradients(step))
            if whole
        ]
        return math.sqrt(max(own.along, own.whole * float(np.mean(shares)))) if own.whole else 0.0

    def gradients(self, step: int) -> list[str]:
        """The keys of all gradients of a step."""
        return sorted(key for key in self.references[0].names(step) if key.startswith("gradient/"))

    def _squares_along(self, step: int, key: str) -> _Squares:
        rows, columns, along = self.mean_squares(step, key, "rows", "columns", "along")
        return _Squares(float(along[0]), rows.size * columns.size * float(rows.mean()))

    def loss_sigma(self, step: int) -> float:
        """σ of the mean loss: the larger of the step's own and that of all steps."""
        steps = range(1, 1 + len(self.references[0].steps))
        if not steps:
            return math.nan
        squares = {each: float(self.mean_squares(each, "loss", "rows")[0][0]) for each in steps}
        return math.sqrt(float(np.maximum(squares.get(step, math.nan), np.mean(list(squares.values())))))


@dataclass(frozen=True)
class Summation:
    """How gradients are summed: the type that the recipe asks for, and the number of summands on each side."""

    asked: Policy = "fp32"
    summands: tuple[int, int] = (1, 1)


class MeasuredBounds:
    """Bounds of each side against its float64 reference."""

    notes = ()

    def __init__(
        self,
        pair: Pair,
        precision: Literal["fp32", "bf16"],
        *,
        measurement: Measurement,
        rule: AdamRule,
        summation: Summation,
    ) -> None:
        self._pair, self.measurement, self._rule, self._summation = pair, measurement, rule, summation
        self._summed = UNIT["fp32"]
        self._coarse = EstimatedBounds(pair, precision)
        # A gradient's bound is needed again at its update.
        self._gradient_bounds = RecentArrays(HELD_BYTES)
        self._clips, self._factors = cache(self._clip), cache(self._factors_at)
        self._shapes = lru_cache(2)(lambda step: measurement.references[0].forms(step))

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """A gradient that one side summed in bfloat16 against the recipe, which no bound of bf16 would detect.

        One in 65536 float32 numbers is a bfloat16 number. A gradient that is no sum may consist of them, and so may a small one:
        the sum of two bfloat16 numbers of one size is one itself in 46 of 100 cases.
        """
        if location.phase != "gradient" or self._summation.asked == "bf16":
            return None
        narrow = [_is_bfloat16(side) for side in (left, right)]
        if all(narrow) or not any(narrow):
            return None
        side = narrow.index(True)
        if self._summation.summands[side] == 1 or np.count_nonzero((left, right)[side]) < SUMMED_ELEMENTS:
            return None
        return (
            f"summed in bfloat16: every element in {NAMES[side][0]} is a bfloat16 number, "
            f"the recipe says precision.reduce={self._summation.asked}"
        )

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Iterable[CheckedPair]:
        """Each side against its reference or rule, as the module docstring says for the phase."""
        match location.phase:
            case phase if phase in EXACT_PHASES:
                return self._coarse.checked_pairs(location, left, right)
            case "lr":
                return self._rate(location, left, right)
            case "loss":
                return self._loss(location, left, right)
            case "grad_norm":
                return self._norm(location.step, left, right)
            case phase if phase == CLIP:
                return self._clips(location.step)
            case "moment1" | "moment2":
                return self._moment(location, left, right)
            case "update":
                return self._update(location, left, right)
            case _:
                return self._against_reference(location, left, right)

    def _reference(self, step: int) -> tuple[Trace, Trace] | None:
        left, right = self.measurement.references
        return (left, right) if min(len(left.steps), len(right.steps)) >= step else None

    def _against_reference(self, location: Location, left: Array, right: Array) -> Iterable[CheckedPair]:
        references, key = self._reference(location.step), f"{location.phase}/{location.tensor}"
        if references is None or any(key not in trace.names(location.step) for trace in references):
            yield from self._coarse.checked_pairs(location, left, right)
            return
        own, whole = (
            Bound(self._gradient_bound(location).reshape(left.shape)),
            Bound(self._whole_bound(location)),
        )
        expected = [trace.read(location.step, key).reshape(left.shape) for trace in references]
        each = list(zip((left, right), expected, NAMES, strict=True))
        yield from (CheckedPair(side, wanted, own, names) for side, wanted, names in each)
        for side, wanted, names in each:
            yield as_a_whole(side, wanted, whole, names)
        smallest = min(float(np.linalg.norm(wanted)) for wanted in expected)
        if location.phase == "gradient" and whole.own > DETERMINED * smallest > 0:
            along = Bound(self._along_bound(location))
            yield from (along_itself(side, wanted, along, names) for side, wanted, names in each)

    def _gradient_bound(self, location: Location) -> Array:
        """The bound of every element of a gradient or an activation."""
        return self._gradient_bounds.get(location, lambda: (self._measured_bound(location),))[0]

    def _measured_bound(self, location: Location) -> Array:
        key = f"{location.phase}/{location.tensor}"
        sigma = self.measurement.sigma(location.step, key, self._shape(location))
        own = np.abs(self.measurement.references[0].read(location.step, key)).reshape(sigma.shape)
        own *= RMS_ROUNDING * self._stored_unit(location)
        np.maximum(sigma, own, out=sigma, where=(sigma > 0) & np.isfinite(own))
        dof = EFFECTIVE_DOF * self.measurement.draws
        sigma *= gaussian_max_quantile(sigma.size) * rms_lower_factor(dof)
        sigma += FLOAT32_TINY
        return sigma

    def _stored_unit(self, location: Location) -> float:
        """The rounding unit of the type that a tensor is stored in; of two sides' the smaller."""
        forms = self._pair.forms(location.step, location.phase, location.tensor)
        return min(_UNIT_OF_TYPE.get(form.dtype, 0.0) for form in forms if form is not None)

    def _shape(self, location: Location) -> tuple[int, ...]:
        """That of the left side's reference."""
        key = f"{location.phase}/{location.tensor}"
        return self._shapes(location.step)[key].shape

    def _whole_bound(self, location: Location) -> Array:
        """V · U · |σ| of the tensor as a whole."""
        key = f"{location.phase}/{location.tensor}"
        shape = self._shape(location)
        (rows,) = self.measurement.mean_squares(location.step, key, "rows")
        size = math.prod(shape)
        margin = rms_upper_factor(EFFECTIVE_DOF) * rms_lower_factor(EFFECTIVE_DOF * self.measurement.draws)
        return np.asarray(margin * math.sqrt(size * rows.mean()) + FLOAT32_TINY * math.sqrt(size))

    def _along_bound(self, location: Location) -> Array:
        """T · U · σ along the tensor itself."""
        step, key = location.step, f"{location.phase}/{location.tensor}"
        dof = self.measurement.draws * len(self.measurement.gradients(step))
        margin = gaussian_max_quantile(1) * rms_lower_factor(dof)
        return np.asarray(margin * self.measurement.along_sigma(step, key) + FLOAT32_TINY)

    def _loss(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        """A reference that ended before this step had a non-finite loss on weights that the run itself could use.

        No estimate fills that gap: NaN is expected, which fails.
        """
        at = location.step - 1
        records = [
            trace.steps[at] if at < len(trace.steps) else None for trace in self.measurement.references
        ]
        dof = self.measurement.draws * max(1, len(self.measurement.references[0].steps))
        tokens = max(self._pair.scalar(location.step, "tokens"))
        mean = max((abs(record["loss"]) for record in records if record), default=0.0)
        own = gaussian_max_quantile(1) * rms_lower_factor(dof) * self.measurement.loss_sigma(location.step)
        own += gaussian_max_quantile(1) * self._summed * math.sqrt(1 + tokens / 2) * mean
        own *= tokens if location.tensor == "loss_sum" else 1
        expected = [np.asarray(record[location.tensor] if record else np.nan) for record in records]
        return [
            CheckedPair(side, wanted, Bound(np.asarray(own)), names)
            for side, wanted, names in zip((left, right), expected, NAMES, strict=True)
        ]

    def _rate(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        bound = Bound(np.asarray(SAME_DOUBLE * largest(left, right)))
        references = self._reference(location.step)
        if references is None:
            return [CheckedPair(left, right, bound)]
        wanted = np.asarray(references[0].steps[location.step - 1]["lr"])
        return [
            CheckedPair(side, wanted, bound, (n, "recipe")) for side, n in ((left, "left"), (right, "right"))
        ]

    def _norm(self, step: int, left: Array, right: Array) -> Sequence[CheckedPair]:
        """The root of the sum of squares of the side's own gradients, one long sum."""
        checked_pairs = []
        for side, (reported, names) in enumerate(zip((left, right), OWN_NAMES, strict=True)):
            squares = 0.0
            for name in self._pair.names(step, "gradient"):
                gradient = self._pair.read_side(step, "gradient", name, side)
                if gradient is not None:
                    squares += float(np.sum(np.square(as_float64(gradient))))
            norm = math.sqrt(squares)
            own = self._norm_rounding(step) * norm + FLOAT32_TINY
            checked_pairs.append(CheckedPair(reported, np.asarray(norm), Bound(np.asarray(own)), names))
        return checked_pairs

    def _norm_rounding(self, step: int) -> float:
        """The relative error of the norm; its longest sum is over the largest tensor."""
        largest_sum = max(
            (_size(self._pair, step, name) for name in self._pair.names(step, "gradient")), default=1
        )
        return self._summed * math.sqrt(1 + largest_sum / 2)

    def _clip(self, step: int) -> Sequence[CheckedPair]:
        """The factor fitted to a side's moments; moments that fit no factor are judged as moments.

        A backend may clip by another norm than the one it reports (DeepSpeed does), with the same rounding.
        """
        norms = self._pair.scalar(step, "grad_norm")
        wanted = np.array([self._rule.clip_factor(norm) for norm in norms])
        summed = np.where(wanted < 1, self._norm_rounding(step), 0.0)
        own = MOMENT_ROUNDINGS["moment1"] / 2 * self._summed * clip_condition(self._pair, step)
        allowed = (own + summed) * wanted
        shown, factor = fit_factors(self._pair, step, betas=self._rule.spec.betas), wanted
        if shown is not None:
            within = np.abs(shown.factor - wanted) <= allowed
            factor = np.where(within | shown.explain(wanted), shown.factor, wanted)
        return [
            CheckedPair(
                np.asarray(factor[i]), np.asarray(wanted[i]), Bound(np.asarray(allowed[i])), OWN_NAMES[i]
            )
            for i in range(2)
        ]

    def _factors_at(self, step: int) -> list[float]:
        """Each side's clip factor: the one fitted to its moments if that is within bounds, else the rule's."""
        return [
            float(c.first if abs(c.first - c.second) <= c.bound.own else c.second) for c in self._clips(step)
        ]

    def _moment(self, location: Location, left: Array, right: Array) -> Iterable[CheckedPair]:
        roundings = MOMENT_ROUNDINGS[location.phase] / 2 * self._summed
        for side, factor in enumerate(self._factors(location.step)):
            gradient, before = side_and_before(self._pair, location, side)
            wanted, own = self._rule.moment(location.phase, gradient, before, factor=factor)
            own *= roundings
            own += FLOAT32_TINY
            yield CheckedPair((left, right)[side], wanted, Bound(own), OWN_NAMES[side])

    def _update(self, location: Location, left: Array, right: Array) -> Iterable[CheckedPair]:
        moments = [self._pair.read(location.step, phase, location.tensor) for phase in MOMENTS]
        weights = self._pair.weights(location.step).get(location.tensor, (np.zeros(left.shape),) * 2)
        lr, noise = max(self._pair.scalar(location.step, "lr")), self._noise(location, moments[0], left)
        for side, names in enumerate(OWN_NAMES):
            moment1, moment2 = (float64_side(sides[side], left) for sides in moments)
            wanted = self._rule.update(
                location.tensor, weights[side], moment1, moment2, lr=lr, step=location.step
            )
            moved = np.abs(wanted)
            own = np.abs(weights[side])
            own += moved  # the size of the weight before and after
            own *= WEIGHT_ROUNDINGS
            moved *= UPDATE_ROUNDINGS
            own += moved
            own *= self._summed
            own += FLOAT32_TINY
            yield CheckedPair((left, right)[side], wanted, Bound(own), names, noise)

    def _noise(self, location: Location, moment1: Sides, like: Array) -> Array:
        """Mask of the elements whose gradient's bound reaches the first moment."""
        gradient = Location(location.step, "gradient", location.tensor)
        if self._reference(location.step) is None:
            return np.zeros(like.shape, bool)
        if f"gradient/{location.tensor}" not in self._shapes(location.step):
            return np.zeros(like.shape, bool)
        beta, factor = self._rule.spec.betas[0], max(self._factors(location.step))
        reach = ((1.0 - beta) * factor * self._gradient_bound(gradient)).reshape(like.shape)
        left, right = (np.abs(float64_side(side, like)) for side in moment1)
        size = np.maximum(left, right, out=left)
        # A gradient that cannot move (of A, while B is zero) or is exactly zero on both sides (after a ReLU) is no noise:
        # Adam makes no step of it.
        return (reach >= size) & (reach > FLOAT32_TINY) & (size > 0)


def _is_bfloat16(array: Array) -> bool:
    """Whether every element is a bfloat16 number."""
    return bool(np.all(array.astype(ml_dtypes.bfloat16).astype(np.float64) == array.astype(np.float64)))


def rms_lower_factor(dof: int) -> float:
    """The factor by which a root mean square of `dof` normal values comes out too small, once in a million.

    P(χ² ≤ x) ≤ (x/2)^(ν/2) / Γ(ν/2 + 1), from the incomplete gamma function's series; solved for x.
    """
    half = dof / 2
    return math.sqrt(half) * math.exp(-(math.log(FALSE_ALARM) + math.lgamma(half + 1)) / dof)


def _size(pair: Pair, step: int, name: str) -> int:
    return max(math.prod(side.shape) for side in pair.forms(step, "gradient", name) if side is not None)
