"""Attaching a training method to the model: layers become LoRA layers in place, adapters and encoders are put in."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxtrain.adapter import attach_adapters
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutKey, DropoutPoint, dropped
from jaxtrain.layers import Linear, abstract, wide
from jaxtrain.tensor import matmul
from jaxtrain.virtual import attach_prefix, attach_prompt
from jaxtrain.weights import Order, native_module
from trainspec.methods import (
    Adapter,
    Full,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    target_modules,
)
from trainspec.model import ModelSpec
from trainspec.rng import name_key


class LoRALinear(Linear):
    """y = x W + b + (alpha / rank) (dropout(x) A) B, with A [in, rank] and B [rank, out] (arXiv 2106.09685)."""

    def __init__(self, base: Linear, method: LoRA, keys: np.ndarray) -> None:
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
        low = self.constrain(matmul(dropped, self.lora_a.get_value()), ("batch", "seq", "rank"))
        up = self.constrain(matmul(low, self.lora_b.get_value()), ("batch", "seq", self.out_axis))
        # A Python number would be rounded to bfloat16 before it is used.
        return super().__call__(x, point) + (self.scale * up.astype(wide(up.dtype))).astype(up.dtype)

    def _dropout(self, x: Array, point: DropoutPoint) -> Array:
        x = dropped(x, self.dropout_key[...], step=point.step, rows=point.rows, rate=self.rate)
        return self.constrain(x, ("batch", "seq", self.in_axis))


def attach(
    model: Decoder, spec: ModelSpec, method: Method, *, seed: int, order: Order
) -> dict[str, np.ndarray]:
    """Change `model` in place and return the method's constants by native name (dropout keys), stacks in `order`.

    Differs from torchtrain, whose modules hold their constants themselves.
    """
    match method:
        case Full():
            return {}
        case LoRA():
            return _attach_lora(model, spec, method, seed=seed, order=order)
        case Adapter():
            attach_adapters(model, spec, method)
            return {}
        case PrefixTuning():
            attach_prefix(model, spec, method, order=order)
            return {}
        case PromptTuning() | PTuning():
            return attach_prompt(model, spec, method, seed=seed)
        case other:
            assert_never(other)


def _attach_lora(
    model: Decoder, spec: ModelSpec, method: LoRA, *, seed: int, order: Order
) -> dict[str, np.ndarray]:
    """A module that is adapted in some layers only has A and B in all of them, zero where it is not: both gradients
    are then zero, so they stay zero.
    """
    modules: dict[str, Any] = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    constants: dict[str, np.ndarray] = {}
    for target in target_modules(spec, method):
        native, layer = native_module(target)
        if f"{native}.dropout_key" not in constants:
            keys = np.zeros((len(order), 2) if layer is not None else (2,), np.uint32)
            constants[f"{native}.dropout_key"] = keys
            parent, _, leaf = native.rpartition(".")
            setattr(modules[parent], leaf, LoRALinear(modules[native], method, keys))
        place = ... if layer is None else order.index(layer)
        constants[f"{native}.dropout_key"][place] = name_key(seed, "dropout", target)
    return constants
