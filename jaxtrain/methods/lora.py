"""LoRA: a low-rank product is added to the output of linear layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxtrain.activations import tap
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutKey, DropoutPoint, dropped
from jaxtrain.layers import Linear, abstract
from jaxtrain.methods.low_rank import replace_targets
from jaxtrain.methods.site import Site
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import rounded
from jaxtrain.weight_ops import matmul
from trainspec.methods import LoRA, LowRank


class LoRALinear(Linear):
    """y = x W + b + (alpha / rank) (dropout(x) A) B, with A [in, rank] and B [rank, out] (arXiv 2106.09685)."""

    def __init__(self, name: str, base: Linear, method: LowRank, keys: np.ndarray) -> None:
        self.name = name
        *stack, in_size, out_size = base.kernel.shape
        self.kernel, self.bias = base.kernel, base.bias
        self.in_axis, self.out_axis, self.constrain = base.in_axis, base.out_axis, base.constrain
        self.lora_a = abstract((*stack, in_size, method.rank), base.kernel.dtype)
        self.lora_b = abstract((*stack, method.rank, out_size), base.kernel.dtype)
        self.dropout_key = DropoutKey(jax.ShapeDtypeStruct(keys.shape, jnp.uint32))
        self.scale, self.rate = method.scale, method.dropout

    def __call__(self, x: Array, point: DropoutPoint | None) -> Array:
        x = self.constrain(x, ("batch", "seq", self.in_axis))
        dropped = x if point is None or self.rate == 0 else self._dropout(x, point)
        up = self.product(dropped)
        # In bfloat16 `scale` itself would be rounded.
        scaled = (self.scale * up.astype(accumulation_dtype(up.dtype))).astype(up.dtype)
        added = tap(f"{self.name}.lora_B", rounded(scaled))
        return rounded(super().__call__(x, point) + added)

    def product(self, dropped: Array) -> Array:
        """(dropped A) B."""
        low = self.constrain(matmul(dropped, self.lora_a.get_value()), ("batch", "seq", "rank"))
        low = tap(f"{self.name}.lora_A", low)
        return self.constrain(matmul(low, self.lora_b.get_value()), ("batch", "seq", self.out_axis))

    def _dropout(self, x: Array, point: DropoutPoint) -> Array:
        x = dropped(
            x,
            self.dropout_key[...],
            step=point.step,
            rows=point.rows,
            rate=self.rate,
            stretch=point.stretch,
        )
        return self.constrain(x, ("batch", "seq", self.in_axis))


def attach(model: Decoder, method: LoRA, site: Site) -> dict[str, np.ndarray]:
    """Replace each target by a `LoRALinear`; returns the dropout keys."""
    return replace_targets(model, method, site, LoRALinear)
