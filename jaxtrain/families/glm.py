"""GLM: Llama that rotates pairs of neighbours in a part of each head, with gate and up in one matrix.

B batch, S sequence, E embed, M mlp, H heads, D head dim, R rotated elements of a head.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from jaxtrain.activations import tap
from jaxtrain.dropout import DropoutPoint
from jaxtrain.families.llama import Attention, Block, Llama, SwiGLU
from jaxtrain.layers import Build, Dim, Linear, swiglu
from jaxtrain.precision import computed_wide
from jaxtrain.rounding import rounded
from trainspec.model import ModelSpec


@computed_wide
def rotate_neighbours(x_BSHD: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of the first R elements of each head: element 2j turns with 2j + 1. The tables are of halves."""
    R = cos.shape[-1]
    cos, sin = (jnp.repeat(table[..., : R // 2], 2, axis=-1) for table in (cos, sin))
    turning, rest = x_BSHD[..., :R], x_BSHD[..., R:]
    across = jnp.stack([-turning[..., 1::2], turning[..., 0::2]], axis=-1).reshape(turning.shape)
    return jnp.concatenate([rounded(turning * cos + across * sin), rest], axis=-1)


class _Attention(Attention):
    output_bias: ClassVar[bool] = False

    def rotate(self, x_BSHD: Array, cos: Array, sin: Array) -> Array:
        return rotate_neighbours(x_BSHD, cos, sin)


class FusedSwiGLU(SwiGLU):
    """down(silu(gate(x)) * up(x)), with one matrix of gate and up, gate first."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        embed, mlp = Dim("embed", spec.embed), Dim("mlp", spec.mlp)
        self.constrain = build.constrain
        self.gate_up_proj = Linear(embed, Dim("gate_up", 2 * spec.mlp), bias=False, stack=stack, build=build)
        self.down_proj = Linear(mlp, embed, bias=False, stack=stack, build=build)

    def __call__(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        gate, up = (
            self.constrain(half_BSM, ("batch", "seq", "mlp"))
            for half_BSM in jnp.split(self.gate_up_proj(x_BSE, point), 2, axis=-1)
        )
        product = tap("product", swiglu(gate, up))
        return self.down_proj(product, point)


class _Block(Block):
    attention: ClassVar[type[Attention]] = _Attention
    feed_forward: ClassVar[type[SwiGLU]] = FusedSwiGLU


class Glm(Llama):
    """The whole model."""

    block: ClassVar[type[Block]] = _Block
