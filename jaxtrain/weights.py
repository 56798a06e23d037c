"""Canonical weights to native ones and back: the only file that transposes weights and stacks layers.

Native names are paths of the nnx model: `layers.MODULE.kernel` [L, in, out] holds all `model.layers.{i}.MODULE.weight`,
each [out, in]. The weights of an LSTM and of embeddings are not transposed. `order` is the layer in each slot of a stack
(`trainspec.plans.pipeline.stack_order`); a slot without a layer holds zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import DTypeLike, NDArray

from trainspec.methods import ENCODER, PEFT_PREFIX
from trainspec.params import Param
from trainspec.plans.plan import DimAxes
from trainspec.weight import WeightLike

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


def from_canonical(
    weights: Iterable[tuple[Param, WeightLike]],
    *,
    order: Order,
    shardings: Mapping[str, NamedSharding],
    dtype: DTypeLike,
) -> dict[str, Array]:
    """Sharded native arrays of canonical weights. A layer that is not among `weights` is zero in its stack.

    Of each weight only the shards of this process's devices are read.
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
    name: str, param: Param, stack: _Stack, *, order: Order, sharding: NamedSharding, dtype: DTypeLike
) -> Array:
    stacked = param.layer is not None
    shards: dict[tuple[Any, ...], NDArray[Any]] = {}  # devices that hold the same shard read it once

    def shard(index: tuple[slice, ...] | None) -> NDArray[Any]:
        assert index is not None  # JAX's type allows it, for shardings without devices of this process
        key = tuple((s.start, s.stop) for s in index)
        if key not in shards:
            inner = index[1:] if stacked else index
            held = order[index[0]] if stacked else [None]
            layers = [_native_slice(name, param, stack.get(layer), inner) for layer in held]
            shards[key] = (np.stack(layers) if stacked else layers[0]).astype(dtype)
        return shards[key]

    return jax.make_array_from_callback(_shape(param, order), sharding, shard)


def _native_slice(
    name: str, param: Param, weight: WeightLike | None, index: tuple[slice, ...]
) -> NDArray[Any]:
    """The slice `index` of one layer in native layout; zeros without a weight."""
    canonical = index[::-1] if name.endswith(TRANSPOSED) else index
    if weight is None:
        array = np.zeros([len(range(n)[s]) for s, n in zip(canonical, param.shape, strict=True)])
    else:
        array = weight[canonical]
    native = array.T if name.endswith(TRANSPOSED) else array
    return native


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
        canonical[param.name] = np.array(array.T if name.endswith(TRANSPOSED) else array, order="C")
    return canonical


def to_host(array: Array) -> NDArray[Any]:
    """The whole array, gathered from all processes if it is sharded over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
