"""What methods share that add a low-rank product to linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from jaxtrain.decoder import Decoder
from jaxtrain.layers import Linear
from jaxtrain.methods.site import Site
from jaxtrain.weights import native_module
from trainspec.methods import LowRank, target_modules
from trainspec.model import ModelSpec
from trainspec.rng import name_key


def replace_targets(
    model: Decoder, method: LowRank, site: Site, layer_class: Callable[[str, Linear, Any, np.ndarray], Linear]
) -> dict[str, np.ndarray]:
    """Replace each target by a layer of `layer_class`; returns the dropout keys by native name.

    A module that is a target in some layers only has A and B in all layers of its stack. In the others both are zero, so
    both gradients are zero and they stay zero.
    """
    modules: dict[str, Any] = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    constants: dict[str, np.ndarray] = {}
    for target in target_modules(site.spec, method):
        native, layer = native_module(target)
        if f"{native}.dropout_key" not in constants:
            keys = np.zeros((len(site.order), 2) if layer is not None else (2,), np.uint32)
            constants[f"{native}.dropout_key"] = keys
            parent, _, leaf = native.rpartition(".")
            setattr(modules[parent], leaf, layer_class(leaf, modules[native], method, keys))
        slot = ... if layer is None else site.order.index(layer)
        # Parts of a fused matrix take the same input, dropped alike.
        constants[f"{native}.dropout_key"][slot] = name_key(site.seed, "dropout", method.tied(target))
    return constants


def tied_weights(spec: ModelSpec, method: LowRank) -> dict[str, str]:
    """The native names of every A that is another's, with that one's name."""
    pairs = ((module, method.tied(module)) for module in target_modules(spec, method))
    return {
        f"{native_module(module)[0]}.lora_a": f"{native_module(owner)[0]}.lora_a"
        for module, owner in pairs
        if owner != module
    }
