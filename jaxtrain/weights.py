"""Canonical weights to native ones and back: the only file that transposes weights and stacks layers.

Native names are paths of the nnx model: `layers.MODULE.kernel` [L, in, out] holds all `model.layers.{i}.MODULE.weight`,
each [out, in]. The weights of an LSTM and of embeddings are not transposed. `order` is the layer in each slot of a stack
(`trainspec.plans.pipeline.stack_order`); a slot without a layer holds zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec, Sharding
from numpy.typing import DTypeLike, NDArray

from trainspec.files.tensors import copy_into, transposed
from trainspec.methods import ENCODER, PEFT_PREFIX
from trainspec.params import Param
from trainspec.plans.plan import DimAxes
from trainspec.weight import Index, WeightLike

# Device arrays by name: native arrays, the fields of a batch, activations by point.
Arrays = dict[str, Array]
LAYER = re.compile(r"^layers\.(\d+)\.")
LEAVES = {
    "linear": "kernel",
    "head": "kernel",
    "norm": "scale",
    "embedding": "embedding",
    "adapter": "kernel",
}
# `weight_ih_l0_reverse` of torch.nn.LSTM: a module for each layer and direction here.
LSTM_LEAF = re.compile(r"\.(?P<leaf>(?:weight|bias)_(?:ih|hh))_(?P<which>l\d+(?:_reverse)?)$")
TRANSPOSED = ("kernel", "lora_a", "lora_b")
# Canonical weights by layer (None outside a stack).
_Stack = dict[int | None, WeightLike]
# The layer in each slot of a stack, None where there is none.
Order = Sequence[int | None]
# The first and the last index, exclusive, of a shard along every dimension.
Bounds = tuple[tuple[int, int], ...]
Device = TypeVar("Device")


def native_module(module: str) -> tuple[str, int | None]:
    """The nnx path of a canonical module, and its layer if it is in a stack."""
    path = module.removeprefix("model.")
    layer = LAYER.match(path)
    return (LAYER.sub("layers.", path), int(layer[1])) if layer else (path, None)


def native_name(param: Param) -> tuple[str, int | None]:
    """The native name of a weight, and its layer if it is in a stack."""
    if param.name.startswith(PEFT_PREFIX):
        module, matrix, _ = param.name.removeprefix(PEFT_PREFIX).rsplit(".", 2)
        path, layer = native_module(module)
        return f"{path}.{matrix.lower()}", layer
    path, layer = native_module(param.module)
    if lstm := LSTM_LEAF.search(param.name):
        return f"{path}.{lstm['which']}.{lstm['leaf']}", layer
    if param.module == f"{ENCODER}.embedding":
        return path, layer
    return f"{path}.{'bias' if param.name.endswith('.bias') else LEAVES[param.role]}", layer


def is_stacked(name: str) -> bool:
    """Whether a native array is a stack, with layers in front."""
    return name.startswith("layers.")


def native_spec(param: Param, axes: DimAxes) -> PartitionSpec:
    """The sharding of one layer of a native array, from the mesh axes that split each canonical dimension."""
    native_axes = reversed(axes) if native_name(param)[0].endswith(TRANSPOSED) else axes
    return PartitionSpec(*(dim or None for dim in native_axes))


def native_shapes(table: Iterable[Param], *, order: Order) -> dict[str, tuple[int, ...]]:
    """The shapes of the native arrays that hold the weights of `table`, by native name."""
    return {native_name(p)[0]: _shape(p, order) for p in table}


def _shape(param: Param, order: Order) -> tuple[int, ...]:
    shape = param.shape[::-1] if native_name(param)[0].endswith(TRANSPOSED) else param.shape
    return shape if param.layer is None else (len(order), *shape)


@dataclass(frozen=True)
class Layout:
    """What a native array holds: the canonical weight in each slot of a stack, None where there is none, or its one weight."""

    weights: tuple[str | None, ...]
    is_stacked: bool
    is_transposed: bool

    def boxes(self, index: Index, shard: NDArray[Any]) -> Iterator[tuple[str, Index, NDArray[Any]]]:
        """The boxes of canonical weights in the shard at `index` of the native array: name, index, and a view of the shard."""
        held, inner = [(self.weights[0], shard)], index
        if self.is_stacked:
            held, inner = list(zip(self.weights[index[0]], shard, strict=True)), index[1:]
        for name, array in held:
            if name is not None:
                yield (name, inner[::-1], array.T) if self.is_transposed else (name, inner, array)

    def slice_of(self, slot: int, index: Index) -> tuple[int | slice, ...]:
        """Where the slice `index` of the weight in `slot` is in the native array, transposed or not."""
        inner = index[::-1] if self.is_transposed else index
        return (slot, *inner) if self.is_stacked else inner


def layouts(table: Iterable[Param], *, order: Order) -> dict[str, Layout]:
    """What each native array of `table` holds, by native name. A stack may have weights of some layers only."""
    held: dict[str, dict[int | None, str]] = {}
    for param in table:
        name, layer = native_name(param)
        held.setdefault(name, {})[layer] = param.name
    return {
        name: Layout(
            tuple(weights.get(layer) for layer in (order if is_stacked(name) else (None,))),
            is_stacked(name),
            name.endswith(TRANSPOSED),
        )
        for name, weights in held.items()
    }


def from_canonical(
    weights: Iterable[tuple[Param, WeightLike]],
    *,
    order: Order,
    shardings: Mapping[str, Sharding],
    dtype: DTypeLike,
) -> dict[str, Array]:
    """Sharded native arrays of canonical weights. A layer that is not among `weights` is zero in its stack.

    Of each weight only the shards of this process's devices are read, and one shard at a time is held beside the arrays.
    """
    stacks: dict[str, tuple[Param, _Stack]] = {}
    for param, weight in weights:
        name, layer = native_name(param)
        stacks.setdefault(name, (param, {}))[1][layer] = weight
    return {
        name: _native(name, param, stack, order=order, sharding=shardings[name], dtype=dtype)
        for name, (param, stack) in stacks.items()
    }


def _native(
    name: str, param: Param, stack: _Stack, *, order: Order, sharding: Sharding, dtype: DTypeLike
) -> Array:
    shape = _shape(param, order)
    held = sharding.addressable_devices_indices_map(shape)
    arrays: list[Array] = []
    for index, devices in devices_by_shard(held, shape).items():
        shard = _native_shard(name, param, stack, index, order=order, dtype=dtype)
        copies = [jax.device_put(shard, device) for device in devices]
        # Before the next one is read.
        arrays += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def devices_by_shard(
    indices: Mapping[Device, tuple[slice, ...] | None], shape: tuple[int, ...]
) -> dict[Bounds, list[Device]]:
    """The devices that hold each shard of an array, by the shard's bounds along every dimension."""
    found: dict[Bounds, list[Device]] = {}
    for device, index in indices.items():
        assert index is not None  # JAX's type allows it, for shardings without devices
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return found


def _native_shard(
    name: str, param: Param, stack: _Stack, bounds: Bounds, *, order: Order, dtype: DTypeLike
) -> NDArray[Any]:
    """One shard of a native array; zero where a stack has no weight. Read weight by weight."""
    shard = np.zeros([stop - start for start, stop in bounds], dtype)
    index = tuple(slice(*pair) for pair in bounds)
    slots: list[tuple[int | None, NDArray[Any]]] = [(None, shard)]
    inner = index
    if param.layer is not None:
        slots, inner = list(zip(order[index[0]], shard, strict=True)), index[1:]
    for layer, target in slots:
        if layer in stack:
            is_transposed = name.endswith(TRANSPOSED)
            weight = stack[layer][inner[::-1] if is_transposed else inner]
            copy_into(target, weight.T if is_transposed else weight)
    return shard


def to_canonical(
    native: Mapping[str, Array], table: Sequence[Param], *, order: Order
) -> dict[str, NDArray[Any]]:
    """The weights of `table` by canonical name, [out, in] and per layer, whole on the host of every process."""
    # In the table's order: all processes have to gather the arrays in the same order.
    host = {name: to_host(native[name]) for name in dict.fromkeys(native_name(p)[0] for p in table)}
    canonical = {}
    for param in table:
        name, layer = native_name(param)
        array = host[name] if layer is None else host[name][order.index(layer)]
        # A copy: the host array may share memory with a buffer that the next update reuses.
        canonical[param.name] = transposed(array) if name.endswith(TRANSPOSED) else np.array(array, order="C")
    return canonical


def to_host(array: Array) -> NDArray[Any]:
    """The whole array, gathered from all processes if it is sharded over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
