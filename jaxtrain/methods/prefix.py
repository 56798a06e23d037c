"""Prefix tuning: trained keys and values before every layer's own.

B batch, N virtual tokens, L slots of the stack of layers, K kv heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutKey, DropoutPoint, dropped
from jaxtrain.layers import Build, VirtualTokens, abstract
from jaxtrain.methods.site import Site
from jaxtrain.methods.virtual_tokens import linear_layers
from jaxtrain.weight_ops import read
from jaxtrain.weights import Order
from trainspec.methods import PrefixTuning
from trainspec.methods.prefix import dropout_name
from trainspec.model import ModelSpec
from trainspec.rng import name_key

# Logical axes of the prefix [L, N, 2, K, D].
PREFIX_AXES = ("stage", "virtual", "pair", "kv_heads", "dim")


def attach(model: Decoder, method: PrefixTuning, site: Site) -> dict[str, np.ndarray]:
    """Give every layer's attention the encoder's keys and values; returns the keys of their dropout."""
    encoder = PrefixEncoder(site.spec, method, order=site.order, build=model.build)
    model.prompt_encoder = nnx.data(encoder)
    model.prefix_is_before = method.positions == "after_prefix"
    if not method.dropout:
        return {}
    path = model.drop_prefix(PrefixDropout(len(site.order), rate=method.dropout))
    return {
        f"{path}.{which}": np.array(
            [
                (0, 0) if i is None else name_key(site.seed, "dropout", dropout_name(i, which))
                for i in site.order
            ],
            np.uint32,
        )
        for which in ("key", "value")
    }


class PrefixDropout(nnx.Module):
    """Dropout of a layer's keys and values [B, N, K, D], from the shared generator: each example has masks of its own."""

    def __init__(self, layers: int, *, rate: float) -> None:
        self.key, self.value = (DropoutKey(jax.ShapeDtypeStruct((layers, 2), jnp.uint32)) for _ in range(2))
        self.rate = rate

    def __call__(self, keys: Array, values: Array, point: DropoutPoint) -> tuple[Array, Array]:
        return self._dropped(keys, self.key[...], point), self._dropped(values, self.value[...], point)

    def _dropped(self, x_BNKD: Array, key: Array, point: DropoutPoint) -> Array:
        B, N, *_ = x_BNKD.shape
        flat = dropped(x_BNKD.reshape(B, N, -1), key, step=point.step, rows=point.rows, rate=self.rate)
        return flat.reshape(x_BNKD.shape)


class PrefixEncoder(nnx.Module):
    """The prefix itself is trained, or an MLP projects it from trained embeddings: PEFT's PrefixEncoder, or ChatGLM2's.

    For each virtual token it gives the keys and values of all layers in the model's order, then stacked in `order`.
    """

    def __init__(self, spec: ModelSpec, method: PrefixTuning, *, order: Order, build: Build) -> None:
        self.shape = (method.virtual_tokens, spec.layers, 2, spec.kv_heads, spec.head_dim)
        # A slot without a layer ignores its prefix: any will do.
        self.order = tuple(layer or 0 for layer in order)
        self.dtype, self.constrain = build.dtype, build.constrain
        widths = method.widths(spec)
        self.embedding = abstract((self.shape[0], widths.embedding), build.dtype)
        self.transform = linear_layers(*widths, build=build) if method.projection else None

    def __call__(self, step: Array | None) -> VirtualTokens:
        """A prefix [L, N, 2, K, D]."""
        made = read(self.embedding.get_value())
        if self.transform is not None:
            first, last = self.transform.values()
            inner = jnp.tanh(first(made, None).astype(self.dtype))
            made = last(inner, None).astype(made.dtype)
        prefix_LN2KD = jnp.moveaxis(made.reshape(self.shape), 1, 0)[np.array(self.order)]
        return VirtualTokens(prefix=self.constrain(prefix_LN2KD, PREFIX_AXES))
