"""Prefix tuning: trained keys and values before every layer's own.

N virtual tokens, L slots of the stack of layers, K kv heads, D head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxtrain.decoder import Decoder
from jaxtrain.layers import Build, VirtualTokens, abstract
from jaxtrain.methods.site import Site
from jaxtrain.methods.virtual_tokens import linear_layers
from jaxtrain.weight_ops import read
from jaxtrain.weights import Order
from trainspec.methods import PrefixTuning
from trainspec.model import ModelSpec

# Logical axes of the prefix [L, N, 2, K, D].
PREFIX_AXES = ("stage", "virtual", "pair", "kv_heads", "dim")


def attach(model: Decoder, method: PrefixTuning, site: Site) -> dict[str, np.ndarray]:
    """Give every layer's attention the encoder's keys and values; returns no constants."""
    encoder = PrefixEncoder(site.spec, method, order=site.order, build=model.build)
    model.prompt_encoder = nnx.data(encoder)
    return {}


class PrefixEncoder(nnx.Module):
    """PEFT's PrefixEncoder: the prefix itself is trained, or an MLP projects it from trained embeddings.

    For each virtual token it gives the keys and values of all layers in the model's order, then stacked in `order`.
    """

    def __init__(self, spec: ModelSpec, method: PrefixTuning, *, order: Order, build: Build) -> None:
        self.shape = (method.virtual_tokens, spec.layers, 2, spec.kv_heads, spec.head_dim)
        # A slot without a layer ignores its prefix: any will do.
        self.order = tuple(layer or 0 for layer in order)
        self.dtype, self.constrain = build.dtype, build.constrain
        width, whole = spec.kv_heads * spec.head_dim, int(np.prod(self.shape[1:]))
        self.embedding = abstract((self.shape[0], width if method.projection else whole), build.dtype)
        layers = (width, method.hidden or width, whole)
        self.transform = linear_layers(*layers, build=build) if method.projection else None

    def __call__(self, step: Array | None) -> VirtualTokens:
        """A prefix [L, N, 2, K, D]."""
        made = read(self.embedding.get_value())
        if self.transform is not None:
            first, last = self.transform.values()
            inner = jnp.tanh(first(made, None).astype(self.dtype))
            made = last(inner, None).astype(made.dtype)
        prefix_LN2KD = jnp.moveaxis(made.reshape(self.shape), 1, 0)[np.array(self.order)]
        return VirtualTokens(prefix=self.constrain(prefix_LN2KD, PREFIX_AXES))
