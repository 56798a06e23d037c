"""The optimizer as a trace shows it: its coefficients, read off the run, so that no recipe is needed.

They only scale bounds. What moments and updates themselves are is compared between the sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.pair import Pair, as_float64
from parity.phases import Place

Array = NDArray[Any]


def fit_moment(pair: Pair, phase: str, step: int) -> tuple[float, float]:
    """(keep, take) of `moment = keep · moment before + take · gradient^power`, read off the left trace.

    `keep` is the beta, `take` is 1 - beta times the clip factor (to the power): least squares over all tensors.
    """
    power = 1 if phase == "moment1" else 2
    normal, target = np.zeros((2, 2)), np.zeros(2)
    for name in pair.names(step, phase):
        moment = pair.read(step, phase, name)[0]
        if moment is None:
            continue
        gradient, before = gradient_and_before(pair, Place(step, phase, name))
        columns = np.stack([before[0].ravel(), gradient[0].ravel() ** power])
        normal += columns @ columns.T
        target += columns @ as_float64(moment).ravel()
    size = np.sqrt(np.maximum(np.diag(normal), np.finfo(np.float64).tiny))
    keep, take = np.abs(np.linalg.lstsq(normal / np.outer(size, size), target / size, rcond=None)[0] / size)
    return min(1.0, float(keep)), min(1.0, float(take))


def fit_update(pair: Pair, step: int) -> float:
    """r of `update = -r · moment1 / sqrt(moment2)`, read off the left trace, large gradients counting most."""
    top = bottom = 0.0
    for name in pair.names(step, "update"):
        sides = [pair.read(step, group, name)[0] for group in ("update", "moment1", "moment2")]
        if any(side is None or side.shape != sides[0].shape for side in sides if sides[0] is not None):
            continue
        update, moment1, moment2 = (as_float64(side) for side in sides if side is not None)
        top += float(np.sum(moment1 * np.sqrt(np.abs(moment2)) * update))
        bottom += float(np.sum(moment1**2))
    return abs(top) / bottom if bottom else 0.0


def gradient_and_before(pair: Pair, place: Place) -> tuple[Array, Array]:
    """[2, ...] gradients of both sides at the place, and its moments one step earlier (zero before the first)."""
    shape = next(side for side in pair.read(place.step, place.phase, place.tensor) if side is not None)
    gradient = float64_sides(pair.read(place.step, "gradient", place.tensor), shape)
    if place.step == 1:
        return gradient, np.zeros_like(gradient)
    return gradient, float64_sides(pair.read(place.step - 1, place.phase, place.tensor), shape)


def float64_sides(sides: Iterable[Array | None], like: Array) -> Array:
    """[2, ...] of both sides; one that is missing or of another shape fails at its own place and counts as zero."""
    return np.stack(
        [
            np.zeros(like.shape) if side is None or side.shape != like.shape else as_float64(side)
            for side in sides
        ]
    )
