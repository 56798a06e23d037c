"""Bottleneck adapters after attention and MLP, before their output is added to the residual stream.

Houlsby and others, arXiv 1902.00751, figure 2. Adapters are not split over `tensor`, as the stream is not.

B examples, S sequence, E embed.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax
import numpy as np
from flax import nnx
from jax import Array

from jaxtrain.activations import tap
from jaxtrain.decoder import Decoder
from jaxtrain.layers import Build, Dim, Linear
from jaxtrain.methods.site import Site
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import rounded
from trainspec.methods import Adapter
from trainspec.model import ModelSpec


class Bottleneck(nnx.Module):
    """h + up(act(down(h))), act in the accumulation type."""

    def __init__(self, name: str, spec: ModelSpec, method: Adapter, *, build: Build) -> None:
        embed, width, stack = Dim("embed", spec.embed), Dim("bottleneck", method.bottleneck), (spec.layers,)
        self.down = Linear(embed, width, bias=True, stack=stack, build=build)
        self.up = Linear(width, embed, bias=True, stack=stack, build=build)
        self.name = name
        self.activation: Literal["relu", "gelu", "silu"] = method.activation

    def __call__(self, h_BSE: Array) -> Array:
        """The output [B, S, E] of the module before it, adapted."""
        down = self.down(h_BSE, None)
        acted = _act(self.activation, down.astype(accumulation_dtype(down.dtype))).astype(down.dtype)
        hidden = tap(f"{self.name}.hidden", rounded(acted))
        return rounded(h_BSE + self.up(hidden, None))


def _act(activation: Literal["relu", "gelu", "silu"], x: Array) -> Array:
    match activation:
        case "relu":
            return jax.nn.relu(x)
        case "gelu":
            # Exact, with erf.
            return jax.nn.gelu(x, approximate=False)
        case "silu":
            return jax.nn.silu(x)
        case other:
            assert_never(other)


def attach(model: Decoder, method: Adapter, site: Site) -> dict[str, np.ndarray]:
    """Add two adapters to each layer of `model`."""
    for name in ("attention_adapter", "mlp_adapter"):
        setattr(model.layers, name, nnx.data(Bottleneck(name, site.spec, method, build=model.build)))
    return {}
