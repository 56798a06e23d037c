"""Recording activations and their gradients at the points of `trainspec.points`.

The model calls `tap` at every point. Inside `recording` a probe, an array of zeros, is added there: the sum is the
activation, and the gradient with respect to the probe is the activation's. Outside of it nothing is added to a program.
By native names: points inside layers are `layers.NAME` and have the layers in front, as weights have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxtrain.rounding import gradient_rounded
from jaxtrain.weights import is_stacked

# By native name. None records every point, without probes.
Probes = Mapping[str, Array] | None
NO_PROBES: Probes = {}
IN_LAYERS = "layers."
Tree = TypeVar("Tree")


class _Recorder:
    def __init__(self, probes: Probes, prefix: str) -> None:
        self._probes, self._prefix = probes, prefix
        self.recorded: dict[str, Array] = {}

    def records(self, point: str) -> bool:
        return self._probes is None or f"{self._prefix}{point}" in self._probes

    def __call__(self, point: str, x: Array) -> Array:
        if not self.records(point):
            return x
        name = f"{self._prefix}{point}"
        if self._probes is not None:
            # The gradient that is recorded is a stored number, too: that of the logits is nothing else.
            x = gradient_rounded(x + self._probes[name])
        self.recorded[name] = x
        return x


_active: ContextVar[_Recorder | None] = ContextVar("recorder of activations", default=None)


@contextmanager
def recording(probes: Probes, *, prefix: str = "") -> Iterator[dict[str, Array]]:
    """Trace what follows with `probes`; the dictionary gets the activations at their points, by the same names."""
    recorder = _Recorder(probes, prefix)
    token = _active.set(recorder)
    try:
        yield recorder.recorded
    finally:
        _active.reset(token)


def tap(point: str, x: Array) -> Array:
    """x, an activation at a point of `trainspec.points`, where it is recorded if that is asked for."""
    recorder = _active.get()
    return x if recorder is None else recorder(point, x)


def is_recorded(point: str) -> bool:
    """Whether that activation is recorded where this is called."""
    recorder = _active.get()
    return recorder is not None and recorder.records(point)


def zero_probes(record: Callable[[], Tree]) -> Tree:
    """Probes for all points of what `record` traces; it gives the activations that were recorded without probes."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(record))


def by_point(recorded: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays [examples, ...] by point, each layer's apart; `recorded` has the accumulation slices in front."""
    return {point: np.array(array).reshape(-1, *array.shape[2:]) for point, array in _split_layers(recorded)}


def _split_layers(recorded: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in recorded.items():
        if is_stacked(name):
            point = name.removeprefix(IN_LAYERS)
            yield from ((f"{IN_LAYERS}{i}.{point}", array[:, i]) for i in range(array.shape[1]))
        else:
            yield name, array
