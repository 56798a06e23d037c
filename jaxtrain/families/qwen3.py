"""Qwen3: Llama with an RMS norm of every query and key head before the rotation.

B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import ClassVar

from jax import Array

from jaxtrain.activations import tap
from jaxtrain.families.llama import Attention, Block, Llama
from jaxtrain.layers import Build, RMSNorm
from trainspec.model import ModelSpec


class _Attention(Attention):
    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        super().__init__(spec, stack=stack, build=build)
        self.q_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, stack=stack, build=build)
        self.k_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, stack=stack, build=build)

    def before_rotation(self, q_BSHD: Array, k_BSKD: Array) -> tuple[Array, Array]:
        return tap("query_norm", self.q_norm(q_BSHD)), tap("key_norm", self.k_norm(k_BSKD))


class _Block(Block):
    attention: ClassVar[type[Attention]] = _Attention


class Qwen3(Llama):
    """The whole model."""

    block: ClassVar[type[Block]] = _Block
