"""Training methods, one file per kind: each replaces layers of the model in place, or adds adapters or an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.decoder import Decoder
from jaxtrain.methods import bottleneck, dora, full, lora, prefix, prompt, ptuning
from jaxtrain.methods.low_rank import tied_weights
from jaxtrain.methods.site import Site
from jaxtrain.methods.virtual_tokens import with_virtual_tokens
from jaxtrain.weights import Order
from trainspec.methods import LowRank, Method
from trainspec.model import ModelSpec

__all__ = ["ATTACH", "attach", "tied", "with_virtual_tokens"]

# The registry: what changes a model, by kind of method.
ATTACH: dict[str, Callable[[Decoder, Any, Site], dict[str, np.ndarray]]] = {
    "full": full.attach,
    "lora": lora.attach,
    "dora": dora.attach,
    "adapter": bottleneck.attach,
    "prompt": prompt.attach,
    "ptuning": ptuning.attach,
    "prefix": prefix.attach,
}


def attach(
    model: Decoder, spec: ModelSpec, method: Method, *, seed: int, order: Order
) -> dict[str, np.ndarray]:
    """Change `model` in place; returns the method's constants (dropout keys) by native name, stacks in `order`.

    Differs from torchtrain, whose modules hold their constants themselves.
    """
    return ATTACH[method.kind](model, method, Site(spec, seed=seed, order=order))


def tied(spec: ModelSpec, method: Method) -> dict[str, str]:
    """Native names in the model whose weight is another one's, with that one's name: its gradient is the sum of all uses."""
    return tied_weights(spec, method) if isinstance(method, LowRank) else {}
