"""Canonical weights to native ones and back: every transpose and every stacking of layers lives here.

Native names are paths of the nnx model: `layers.self_attn.q_proj.kernel` is [L, in, out] and stands for
`model.layers.{i}.self_attn.q_proj.weight`, each [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from trainspec.methods import PEFT_PREFIX
from trainspec.params import Param

LAYER = re.compile(r"^layers\.(\d+)\.")
LEAVES = {"linear": "kernel", "head": "kernel", "norm": "scale", "embedding": "embedding"}
TRANSPOSED = ("kernel", "lora_a", "lora_b")


def native_module(module: str) -> tuple[str, int | None]:
    """The nnx path of a canonical module, and its layer where it is one of a stack."""
    path = module.removeprefix("model.")
    layer = LAYER.match(path)
    return (LAYER.sub("layers.", path), int(layer[1])) if layer else (path, None)


def native_name(param: Param) -> tuple[str, int | None]:
    """The native name of a row of the table, and its layer where it is one of a stack."""
    if param.role == "adapter":
        module, matrix, _ = param.name.removeprefix(PEFT_PREFIX).rsplit(".", 2)
        path, layer = native_module(module)
        return f"{path}.{matrix.lower()}", layer
    path, layer = native_module(param.module)
    return f"{path}.{'bias' if param.name.endswith('.bias') else LEAVES[param.role]}", layer


def from_canonical(weights: Iterable[tuple[Param, NDArray[Any]]], *, layers: int) -> dict[str, Array]:
    """Native arrays of canonical weights. A layer that is not among `weights` is zero in its stack."""
    native: dict[str, NDArray[Any]] = {}
    for param, array in weights:
        name, layer = native_name(param)
        placed = array.T if name.endswith(TRANSPOSED) else array
        if layer is None:
            native[name] = placed
        else:
            native.setdefault(name, np.zeros((layers, *placed.shape), placed.dtype))[layer] = placed
    return {name: jnp.asarray(native.pop(name)) for name in list(native)}


def to_canonical(native: Mapping[str, Array], table: Sequence[Param]) -> dict[str, NDArray[Any]]:
    """The rows of `table` by canonical name, [out, in] and per layer, on the host."""
    host = {name: np.asarray(native[name]) for name in {native_name(p)[0] for p in table}}
    canonical = {}
    for param in table:
        name, layer = native_name(param)
        array = host[name] if layer is None else host[name][layer]
        # A copy: the host array may share its memory with a buffer that the next update takes over.
        canonical[param.name] = np.array(array.T if name.endswith(TRANSPOSED) else array, order="C")
    return canonical
