"""Which shard of every array each device holds: weights, gradients, moments, batches and activations.

The plan says it in logical axes; `NamedSharding`s say it to the compiler, which inserts the communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.weights import native_name, native_spec
from trainspec.params import Param
from trainspec.plans.plan import ACTIVATION_AXES, BATCH_AXES, Plan, StateKind, weight_axes

# Shards an activation, given the logical axis of each of its dimensions.
Constrain = Callable[[Array, tuple[str, ...]], Array]

_taken: ContextVar[tuple[str, ...]] = ContextVar("mesh axes of a vmap", default=())


@contextmanager
def batch_axes_taken() -> Iterator[None]:
    """Trace what follows under a vmap over replicas: its dimension is split over the batch's mesh axes, and no other."""
    token = _taken.set(BATCH_AXES)
    try:
        yield
    finally:
        _taken.reset(token)


@dataclass(frozen=True)
class WeightSharding:
    """How one layer of a weight is sharded while it is used, and how its gradient is (None if the weight is frozen).

    `needs_gather` says that it is stored in smaller shards than it is used in; `gradient_dtype` is the type in which
    its gradient is summed.
    """

    in_use: NamedSharding
    needs_gather: bool
    gradient: NamedSharding | None
    gradient_dtype: np.dtype


class Shardings:
    """The sharding of every array of a run.

    `of[kind][name]` is that of a native array (layers in front), as a weight, as a gradient or in the optimizer's state.
    `plan.shards` changes nothing but these (docs/decisions/0009).
    """

    def __init__(self, mesh: Mesh, plan: Plan, table: Sequence[Param]) -> None:
        self._mesh, self._plan = mesh, plan
        self._entries = {native_name(p)[0]: p for p in table}
        self.of: dict[StateKind, dict[str, NamedSharding]] = {
            kind: {name: self._stacked(p, kind) for name, p in self._entries.items()}
            for kind in get_args(StateKind)
        }

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: that of the devices."""
        return self._mesh.devices.flat[0].platform

    def weight(self, name: str, *, is_trained: bool, gradient_dtype: np.dtype) -> WeightSharding:
        """The sharding of one layer of a weight, given its native name."""
        param = self._entries[name]
        gathered = native_spec(param, weight_axes(param, self._plan, over_fsdp=False))
        in_use, stored, gradient = (
            NamedSharding(self._mesh, spec)
            for spec in (gathered, self._spec(param, "weights"), self._spec(param, "gradients"))
        )
        return WeightSharding(in_use, stored != in_use, gradient if is_trained else None, gradient_dtype)

    def constrain(self, x: Array, axes: tuple[str, ...]) -> Array:
        """Shard an activation as the plan says; `axes` are the logical axes of its dimensions."""
        return lax.with_sharding_constraint(x, self._activation(axes))

    def put(self, array: NDArray[Any], axes: tuple[str, ...]) -> Array:
        """A sharded device array from a host array that every process has whole."""
        return jax.make_array_from_callback(
            array.shape, self._activation(axes), lambda index: array[index or ...]
        )

    def shape(self, shape: tuple[int, ...], axes: tuple[str, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """The abstract value of what `put` returns: enough to compile for."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._activation(axes))

    def _activation(self, axes: tuple[str, ...]) -> NamedSharding:
        free = {axis for axis, size in self._mesh.shape.items() if size > 1}.difference(_taken.get())
        split = (tuple(a for a in ACTIVATION_AXES.get(axis, ()) if a in free) for axis in axes)
        return NamedSharding(self._mesh, PartitionSpec(*(dim or None for dim in split)))

    def _spec(self, param: Param, kind: StateKind) -> PartitionSpec:
        return native_spec(param, weight_axes(param, self._plan, over_fsdp=self._plan.splits(kind)))

    def _stacked(self, param: Param, kind: StateKind) -> NamedSharding:
        spec = self._spec(param, kind)
        layers = "pipe" if self._plan.pipe > 1 else None
        return NamedSharding(self._mesh, spec if param.layer is None else PartitionSpec(layers, *spec))


def constrain_all(arrays: Mapping[str, Array], shardings: Mapping[str, NamedSharding]) -> dict[str, Array]:
    """Shard each of `arrays` as `shardings` says for its name."""
    return {name: lax.with_sharding_constraint(array, shardings[name]) for name, array in arrays.items()}
