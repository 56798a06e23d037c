"""Recording activations and their gradients at the points of `trainspec.trace.activation_points`.

A probe, an array of zeros, is added at each point: the sum is the activation, and the gradient with respect to the probe is
the activation's. Probes inside layers have the layers in front, as weights have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from trainspec.model import ModelSpec
from trainspec.trace import LAYER_POINTS

Probes = Mapping[str, Array]


class Tap:
    """Called with a point and an activation, adds the point's probe, if there is one, and keeps the sum in `recorded`."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self.recorded: dict[str, Array] = {}

    def __call__(self, point: str, x: Array) -> Array:
        if point in self._probes:
            self.recorded[point] = x = x + self._probes[point]
        return x


def zero_probes(spec: ModelSpec, shape: tuple[int, int], dtype: DTypeLike) -> dict[str, Array]:
    """Probes by point for a batch of `shape` [examples, positions]."""
    stacked = {point: jnp.zeros((spec.layers, *shape, spec.embed), dtype) for point in LAYER_POINTS}
    ends = {"embedding": spec.embed, "norm": spec.embed, "logits": spec.vocab}
    return stacked | {point: jnp.zeros((*shape, size), dtype) for point, size in ends.items()}


def by_point(recorded: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays [examples, positions, ...] by point, each layer's apart; `recorded` has the accumulation slices in front."""
    return {point: np.array(array).reshape(-1, *array.shape[2:]) for point, array in _split_layers(recorded)}


def _split_layers(recorded: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    for point, array in recorded.items():
        if point in LAYER_POINTS:
            yield from ((f"layers.{i}.{point}", array[:, i]) for i in range(array.shape[1]))
        else:
            yield point, array
