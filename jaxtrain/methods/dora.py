"""DoRA: the weight of a linear layer is a direction, changed by a low-rank product, times a trained magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxtrain.activations import tap
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import Linear, abstract
from jaxtrain.methods.lora import LoRALinear
from jaxtrain.methods.low_rank import replace_targets
from jaxtrain.methods.site import Site
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import rounded
from jaxtrain.weight_ops import matmul, read, scale, shift
from trainspec.methods import DoRA, LowRank


class IsTarget(nnx.Variable):
    """Whether each layer of a stack is a target: a constant of the module, never trained."""


class Norms(nnx.Variable):
    """The norms of a layer's weights, where they are computed once for many calls."""


class DoRALinear(LoRALinear):
    """y = x W + b + (m (u + s (d A) B) / n - u) with d = dropout(x), u = d W, and n the norms of W + s A B.

    No gradient flows through n. A layer of a stack that is no target computes x W + b.
    """

    def __init__(self, name: str, base: Linear, method: LowRank, keys: np.ndarray) -> None:
        super().__init__(name, base, method, keys)
        *stack, _, out_size = base.kernel.shape
        self.lora_magnitude_vector = abstract((*stack, out_size), base.kernel.dtype)
        self.is_target = IsTarget(jax.ShapeDtypeStruct(keys.shape[:-1], jnp.bool_))
        self.known_norms: Norms | None = None

    def __call__(self, x: Array, point: DropoutPoint | None) -> Array:
        x = self.constrain(x, ("batch", "seq", self.in_axis))
        plain = dropped_plain = self._base(x)
        dropped = x
        if point is not None and self.rate > 0:
            dropped = self._dropout(x, point)
            dropped_plain = self._base(dropped)
        y = plain + self._change(dropped_plain, self.product(dropped))
        return y if self.bias is None else shift(y, self.bias.get_value())

    def _base(self, x: Array) -> Array:
        return self.constrain(matmul(x, self.kernel.get_value()), ("batch", "seq", self.out_axis))

    def _change(self, plain: Array, up: Array) -> Array:
        """What is added to x W, in the accumulation type, as it is a difference of nearly equal numbers."""
        u, is_target = plain.astype(accumulation_dtype(plain.dtype)), self.is_target[...]
        scaled = tap(f"{self.name}.lora_B", self.scale * up.astype(u.dtype))
        turned = rounded(u + scaled, "wide")
        norms = self._norms() if self.known_norms is None else self.known_norms[...]
        direction = rounded(turned / jnp.where(is_target, norms, 1), "wide")
        change = scale(direction, self.lora_magnitude_vector.get_value()) - u
        return jnp.where(is_target, change, 0).astype(plain.dtype)

    def _norms(self) -> Array:
        """The norm [out] of each output's weights, without a gradient (arXiv 2402.09353, section 4.3)."""
        weight, a, b = (
            read(w.get_value()).astype(accumulation_dtype(self.kernel.get_value().value.dtype))
            for w in (self.kernel, self.lora_a, self.lora_b)
        )
        return lax.stop_gradient(jnp.linalg.norm(weight + self.scale * (a @ b), axis=0))

    def all_norms(self) -> Array:
        """Those of the layer, or of a stack of them with the layers in front."""
        if self.is_target[...].ndim == 0:
            return self._norms()
        definition, stacked = nnx.split(self)
        return lax.map(lambda own: nnx.merge(definition, own)._norms(), stacked)


def norms_of(model: Decoder) -> dict[str, Array]:
    """The norms that every `DoRALinear` of a model with weights computes in each call, by a name in its module."""
    return {name: layer.all_norms() for name, layer in _layers(model)}


def give_norms(model: Decoder, norms: Mapping[str, Any]) -> None:
    """Let every `DoRALinear` take its own of `norms_of` instead of computing them."""
    for name, layer in _layers(model):
        layer.known_norms = nnx.data(Norms(norms[name]))


def _layers(model: Decoder) -> list[tuple[str, DoRALinear]]:
    return [
        (".".join([*map(str, path), "known_norms"]), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, DoRALinear)
    ]


def attach(model: Decoder, method: DoRA, site: Site) -> dict[str, np.ndarray]:
    """Replace each target by a `DoRALinear`; returns the dropout keys, and which layers are targets."""
    keys = replace_targets(model, method, site, DoRALinear)
    # Only a target's key is not zero.
    targets = {
        name.replace(".dropout_key", ".is_target"): np.asarray(key.any(axis=-1)) for name, key in keys.items()
    }
    return keys | targets
