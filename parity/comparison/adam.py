"""The optimizer: its coefficients fitted to a trace if there is no recipe, and its rule if there is one.

Fitted coefficients only scale bounds; the moments and updates themselves are compared between the sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import Pair, as_float64
from parity.comparison.phases import Location
from trainspec.recipe import AdamW
from trainspec.trace import Form

Array = NDArray[Any]
MOMENTS = ("moment1", "moment2")
# torch.nn.utils.clip_grad_norm_ and DeepSpeed clip by max / (norm + 1e-6).
CLIP_EPS = 1e-6
# A clip factor appears squared in the second moment; a different beta leaves it alone or changes it otherwise. A
# difference is called a clip if the two agree to this share of it, which no other cause comes near.
CLIP_AGREES = 0.1
ALMOST_ONE = 1.0 - 1e-9  # with a fitted beta of 1, no gradient would be left to read a factor off


def fit_moment(pair: Pair, phase: str, step: int) -> tuple[float, float]:
    """(keep, take) of `moment = keep · previous moment + take · gradient^power`, fitted to the left trace.

    `keep` is the beta, `take` is (1 - beta) · clip factor^power: least squares over all tensors.
    """
    power = 1 if phase == "moment1" else 2
    normal, target = np.zeros((2, 2)), np.zeros(2)
    for name in pair.names(step, phase):
        moment = pair.read_side(step, phase, name, 0)
        if moment is None:
            continue
        columns = np.empty((2, moment.size))
        columns[1], columns[0] = (
            each.ravel() for each in side_and_before(pair, Location(step, phase, name), 0)
        )
        columns[1] **= power
        normal += columns @ columns.T
        target += columns @ as_float64(moment).ravel()
    size = np.sqrt(np.maximum(np.diag(normal), np.finfo(np.float64).tiny))
    keep, take = np.abs(np.linalg.lstsq(normal / np.outer(size, size), target / size, rcond=None)[0] / size)
    return min(1.0, float(keep)), min(1.0, float(take))


def fit_update(pair: Pair, step: int) -> float:
    """r of `update = -r · moment1 / sqrt(moment2) - d · weight`, fitted to the left trace; large gradients count most.

    The decay `d` may differ between tensors, so the component parallel to the weight is removed first.
    """
    top = bottom = 0.0
    weights = pair.weights(step)
    for name in pair.names(step, "update"):
        sides = [pair.read_side(step, group, name, 0) for group in ("update", "moment1", "moment2")]
        if any(side is None or sides[0] is None or side.shape != sides[0].shape for side in sides):
            continue
        update, moment1, moment2 = (as_float64(side) for side in sides if side is not None)
        root = np.sqrt(np.abs(moment2))
        decayed = root * weights[name][0] if name in weights else np.zeros(moment1.shape)
        size = float(np.sum(decayed**2))
        across = moment1 - decayed * (float(np.sum(decayed * moment1)) / size if size else 0.0)
        top += float(np.sum(across * root * update))
        bottom += float(np.sum(across * moment1))
    return abs(top) / bottom if bottom else 0.0


def gradient_and_before(pair: Pair, location: Location) -> tuple[Array, Array]:
    """[2, ...] gradients of both sides at the location, and its moments one step earlier (zero before step 1)."""
    sides = [side_and_before(pair, location, side) for side in range(2)]
    gradient, before = (np.stack(each) for each in zip(*sides, strict=True))
    return gradient, before


def side_and_before(pair: Pair, location: Location, side: int) -> tuple[Array, Array]:
    """The same of one side."""
    like = next(
        form for form in pair.forms(location.step, location.phase, location.tensor) if form is not None
    )
    # Only a run that resumed has moments before its first step.
    before = 0 if location.step == pair.first_step else location.step - 1
    gradient = float64_side(pair.read_side(location.step, "gradient", location.tensor, side), like)
    return gradient, float64_side(pair.read_side(before, location.phase, location.tensor, side), like)


def float64_sides(sides: Iterable[Array | None], like: Array) -> Array:
    """[2, ...] of both sides. A missing or misshapen one fails at its own location and counts as zero."""
    both = np.zeros((2, *like.shape))
    for at, side in enumerate(sides):
        both[at] = float64_side(side, like)
    return both


def float64_side(side: Array | None, like: Array | Form) -> Array:
    """One side in float64; zero where it is missing or misshapen."""
    return np.zeros(like.shape) if side is None or side.shape != like.shape else as_float64(side)


@dataclass(frozen=True)
class Factors:
    """What each side multiplied its gradient by before it entered the moments; every array is [2], left and right.

    `factor` is a least-squares fit over all tensors. `first`, `second` and `residual` belong to the tensor with the
    largest gradient: the factors in its first and second moment, and the relative residual of the first.
    """

    factor: Array
    first: Array
    second: Array
    residual: Array

    def explain(self, expected: Array) -> Array:
        """[2]: whether a clip explains the difference from `expected`: a multiple of the gradient, squared in v.

        No clip has the factor 0: a tensor whose moments do not change was not updated.
        """
        multiple = self.residual <= CLIP_AGREES * np.abs(self.first - expected)
        squared = np.abs(self.second - self.first**2) <= CLIP_AGREES * np.abs(self.first**2 - expected**2)
        return multiple & squared & (self.first > 0) & (self.factor > 0)


def fit_factors(pair: Pair, step: int, *, betas: tuple[float, float]) -> Factors | None:
    """The factors in the moments, given the betas; None if no tensor has moments."""
    sums = [_fit_sums(pair, phase, step, beta) for phase, beta in zip(MOMENTS, betas, strict=True)]
    if not sums[0]:
        return None
    largest = max(sums[0], key=lambda name: float(sums[0][name][1].sum()))
    factor = _ratio(np.sum(list(sums[0].values()), axis=0)) / (1 - betas[0])
    first, second = (
        _ratio(each.get(largest, np.zeros((3, 2)))) / (1 - beta)
        for each, beta in zip(sums, betas, strict=True)
    )
    residual = np.sqrt(_ratio(sums[0][largest][[2, 1, 0]])) / (1 - betas[0])
    return Factors(factor, first, second, residual)


def clip_factors(pair: Pair, step: int) -> tuple[float, float]:
    """Each side's factor in its first moment, 1 - beta1 included, since the two cannot be separated without a recipe.

    The betas are fitted to the left side. The factors are equal unless a clip explains their difference.
    """
    keep1, keep2 = (fit_moment(pair, phase, step)[0] for phase in MOMENTS)
    shown = fit_factors(pair, step, betas=(min(keep1, ALMOST_ONE), min(keep2, ALMOST_ONE)))
    if shown is None:
        return 1.0, 1.0
    left = shown.first[0]
    scale = left**2 / shown.second[0] if shown.second[0] else 1.0
    scaled = replace(shown, second=shown.second * scale)
    if not (left > 0 and shown.factor[0] > 0 and scaled.explain(np.array([left, left]))[1]):
        return float(shown.factor[0]), float(shown.factor[0])
    return float(shown.factor[0]), float(shown.factor[1])


def clip_condition(pair: Pair, step: int) -> float:
    """The amplification (at least 1) of the first moment's rounding errors in the factor fitted to it.

    A moment is rounded at the size of both of its terms; the factor depends on one of them.
    """
    keep, take = fit_moment(pair, "moment1", step)
    kept = added = 0.0
    for name in pair.names(step, "moment1"):
        gradient, before = side_and_before(pair, Location(step, "moment1", name), 0)
        kept += float(np.sum(np.abs(before * gradient)))
        added += float(np.sum(np.square(gradient)))
    return 1.0 + (keep * kept / (take * added) if take * added else 0.0)


def _fit_sums(pair: Pair, phase: str, step: int, keep: float) -> dict[str, Array]:
    """[3, 2] by name, of both sides: Σ added · gradient^power, Σ gradient^(2 power), and the sum of squared residuals.

    `added` is moment - keep · previous moment; the first sum divided by the second is its factor.
    """
    power = 1 if phase == "moment1" else 2
    return {
        name: np.stack(
            [_sums_of_side(pair, Location(step, phase, name), side, keep, power) for side in range(2)], axis=1
        )
        for name in pair.names(step, phase)
    }


def _sums_of_side(pair: Pair, location: Location, side: int, keep: float, power: int) -> Array:
    """[3] of one side and one tensor."""
    powers, added = side_and_before(pair, location, side)
    powers **= power
    added *= keep
    moment = float64_side(pair.read_side(location.step, location.phase, location.tensor, side), added)
    np.subtract(moment, added, out=added)
    product = np.multiply(added, powers, out=moment)
    both = np.array([np.sum(product), np.sum(np.multiply(powers, powers, out=product))])
    residual = np.subtract(added, np.multiply(_ratio(both), powers, out=product), out=product)
    return np.array([*both, np.sum(np.multiply(residual, residual, out=residual))])


def _ratio(sums: Array) -> Array:
    return np.divide(sums[0], sums[1], out=np.zeros(np.shape(sums[0])), where=sums[1] > 0)


@dataclass(frozen=True)
class AdamRule:
    """The recipe's AdamW in numpy float64: what one side's own gradient and state must lead to.

    Implemented independently of both backends: docs/numerics.md, "Clip, optimizer, schedule".
    """

    spec: AdamW
    decayed: frozenset[str]

    def clip_factor(self, norm: float) -> float:
        """min(1, max_norm / (norm + 1e-6)); 1 without clipping."""
        return 1.0 if self.spec.clip_norm is None else min(1.0, self.spec.clip_norm / (norm + CLIP_EPS))

    def moment(self, phase: str, gradient: Array, before: Array, *, factor: float) -> tuple[Array, Array]:
        """The new moment, and the sum of its terms' magnitudes, at whose size it is rounded."""
        first = phase == "moment1"
        beta = self.spec.betas[0 if first else 1]
        kept, added = beta * before, factor * gradient
        if not first:
            added *= added
        added *= 1.0 - beta
        moment = kept + added
        return moment, np.add(np.abs(kept, out=kept), np.abs(added, out=added), out=kept)

    def update(
        self, name: str, weight: Array, moment1: Array, moment2: Array, *, lr: float, step: int
    ) -> Array:
        """What is added to the weight at `step` (counted from 1)."""
        correction1, correction2 = (1.0 - beta**step for beta in self.spec.betas)
        root = np.maximum(moment2, 0.0)
        root /= correction2
        np.sqrt(root, out=root)
        root += self.spec.eps
        added = moment1 / correction1
        added /= root
        decay = self.spec.weight_decay if name in self.decayed else 0.0
        added += np.multiply(decay, weight, out=root)
        added *= -lr
        return added
