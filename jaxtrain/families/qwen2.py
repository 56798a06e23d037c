"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import ClassVar

from jaxtrain.families.llama import Attention, Block, Llama


class _Attention(Attention):
    output_bias: ClassVar[bool] = False


class _Block(Block):
    attention: ClassVar[type[Attention]] = _Attention


class Qwen2(Llama):
    """The whole model."""

    block: ClassVar[type[Block]] = _Block
