"""DoRA: the weight of a linear layer is a direction, changed by a low-rank product, times a trained magnitude."""

from __future__ import annotations

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


class DoRALinear(LoRALinear):
    """y = x W + b + (m (u + s (d A) B) / n - u) with d = dropout(x), u = d W, and n the norms of W + s A B.

    No gradient flows through n. A layer of a stack that is no target computes x W + b.
    """

    def __init__(self, name: str, base: Linear, method: LowRank, keys: np.ndarray) -> None:
        super().__init__(name, base, method, keys)
        *stack, _, out_size = base.kernel.shape
        self.lora_magnitude_vector = abstract((*stack, out_size), base.kernel.dtype)
        self.is_target = IsTarget(jax.ShapeDtypeStruct(keys.shape[:-1], jnp.bool_))

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
        direction = rounded(turned / jnp.where(is_target, self._norms(), 1), "wide")
        change = scale(direction, self.lora_magnitude_vector.get_value()) - u
        return jnp.where(is_target, change, 0).astype(plain.dtype)

    def _norms(self) -> Array:
        """The norm [out] of each output's weights, without a gradient (arXiv 2402.09353, section 4.3)."""
        weight, a, b = (
            read(w.get_value()).astype(accumulation_dtype(self.kernel.get_value().value.dtype))
            for w in (self.kernel, self.lora_a, self.lora_b)
        )
        return lax.stop_gradient(jnp.linalg.norm(weight + self.scale * (a @ b), axis=0))


def attach(model: Decoder, method: DoRA, site: Site) -> dict[str, np.ndarray]:
    """Replace each target by a `DoRALinear`; returns the dropout keys, and which layers are targets."""
    keys = replace_targets(model, method, site, DoRALinear)
    # Only a target's key is not zero.
    targets = {
        name.replace(".dropout_key", ".is_target"): np.asarray(key.any(axis=-1)) for name, key in keys.items()
    }
    return keys | targets
