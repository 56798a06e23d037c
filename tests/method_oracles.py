"""What the independent numpy Llama (tests/backends/numpy_llama.py) is told of each kind of method.

The last weights are those of which a method makes what its gradient takes for a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trainspec.methods import ENCODER, Adapter, DoRA, LoRA, PrefixTuning, VirtualTokens
from trainspec.model import ModelSpec

Weights = dict[str, np.ndarray]
ACTS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(x),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def _full(method: Any, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    return {}


def _lora(method: LoRA, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    return {"lora_scale": method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)}


def _adapter(method: Adapter, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    return {"act": ACTS[method.activation]}


def _rows(method: VirtualTokens, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    return {"rows": _encoded(method, weights)}


def _prefix(method: PrefixTuning, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    made = _encoded(method, weights)
    shape = (len(made), 2 * spec.layers, spec.kv_heads, spec.head_dim)
    return {"prefix": made.reshape(shape), "from_zero": method.positions == "from_zero"}


def _encoded(method: VirtualTokens, weights: Weights) -> np.ndarray:
    return method.encode({name: w for name, w in weights.items() if name.startswith(ENCODER)})


def _dora(method: DoRA, spec: ModelSpec, weights: Weights, held: Weights) -> dict[str, Any]:
    return {
        "lora_scale": method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank),
        "held": held,
    }


ORACLES: dict[str, Callable[[Any, ModelSpec, Weights, Weights], dict[str, Any]]] = {
    "full": _full,
    "lora": _lora,
    "dora": _dora,
    "adapter": _adapter,
    "prompt": _rows,
    "ptuning": _rows,
    "prefix": _prefix,
}
