"""Weights and moments that are read wrongly: entries (param, weight) of a model, and arrays by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.checkpoints.folders import complete
from trainspec.files.hf import TensorFiles
from trainspec.init import starting_weights
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.runs.run import Run
from trainspec.weight import Weight, WeightLike

Array = NDArray[Any]
Entries = Iterable[tuple[Param, Weight]]


def with_pairs_side_by_side(entries: Entries, spec: ModelSpec) -> Iterator[tuple[Param, Weight]]:
    """Rows d and d + D/2 of each head of queries and keys become neighbours."""

    def permuted(array: Array) -> Array:
        halves = array.reshape(-1, 2, spec.head_dim // 2, array.shape[-1])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return _changed(entries, permuted, "q_proj.weight", "k_proj.weight")


def without_qkv_biases(entries: Entries, spec: ModelSpec) -> Iterator[tuple[Param, Weight]]:
    """The biases of queries, keys and values are zero."""
    return _changed(entries, np.zeros_like, "q_proj.bias", "k_proj.bias", "v_proj.bias")


def with_scaled_queries(entries: Entries, spec: ModelSpec) -> Iterator[tuple[Param, Weight]]:
    """The weight of the queries, times 1 / sqrt(D)."""
    return _changed(entries, lambda array: array * array.dtype.type(spec.head_dim**-0.5), "q_proj.weight")


def with_the_first_layer_twice(entries: Entries, spec: ModelSpec) -> Iterator[tuple[Param, Weight]]:
    """The second layer has the first one's weights."""
    first: dict[str, Weight] = {}
    for param, weight in entries:
        first[param.name] = weight
        other = first.get(param.name.replace(".layers.1.", ".layers.0."), weight)
        yield param, other


def _changed(
    entries: Entries, change: Callable[[Array], Array], *ends: str
) -> Iterator[tuple[Param, Weight]]:
    """The weights whose names end so, changed as wholes."""
    for param, weight in entries:
        if param.name.endswith(ends):
            whole = np.ascontiguousarray(change(weight[...]))
            yield param, Weight(whole.shape, whole.dtype, whole.__getitem__)
        else:
            yield param, weight


def of_the_start(arrays: Mapping[str, WeightLike], run: Run) -> dict[str, WeightLike]:
    """What the run starts with: nothing of the checkpoint has a name that is looked for."""
    return {param.name: weight for param, weight in starting_weights(run) if param.name in arrays}


def with_an_older_half(arrays: Mapping[str, WeightLike], path: Path, kind: str) -> dict[str, WeightLike]:
    """The lower half of every tensor is that of the checkpoint before: a shard of another process that is too old."""
    older = TensorFiles([complete(path.parents[1])[-2] / f"{kind}.safetensors"])

    def mixed(name: str, weight: WeightLike) -> Array:
        whole, first = np.array(weight[...]), (weight.shape[0] + 1) // 2
        whole[first:] = older.read(name)[first:].astype(whole.dtype)
        return whole

    return {name: mixed(name, weight) for name, weight in arrays.items()}


def zeros(arrays: Mapping[str, WeightLike]) -> dict[str, Array]:
    """Nothing of what was saved."""
    return {name: np.zeros_like(array[...]) for name, array in arrays.items()}


def rounded_to_bf16(arrays: Mapping[str, WeightLike]) -> dict[str, Array]:
    """What was saved, rounded to bfloat16 in its own type."""
    return {name: _bf16(array[...]) for name, array in arrays.items()}


def _bf16(array: Array) -> Array:
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 256.0) / 256.0, exponent).astype(array.dtype)
