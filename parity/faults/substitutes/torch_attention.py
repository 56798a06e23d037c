"""Llama's and Qwen3's attention written out, to replace Hugging Face's."""

# B examples, S sequence, H heads, K kv heads, D head dim

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from torchtrain.activations import tap
from torchtrain.attention.visible import Visible


def put_into(model: Any) -> None:
    """Have every layer of a LlamaForCausalLM or a Qwen3ForCausalLM attend by `attention`."""
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(attention, layer.self_attn)


def attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, ...],
    visible: Visible,
    **_: Any,
) -> tuple[Tensor, None]:
    """The method `forward` of LlamaAttention and Qwen3Attention: its output, and None for the attention weights."""
    B, S, _E = hidden_states.shape
    layer = f"layers.{self.layer_idx}"
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (p(hidden_states).view(B, S, -1, self.head_dim).transpose(1, 2) for p in projections)
    q_tables, k_tables = position_embeddings[:2], position_embeddings[:2]
    q, k = normed(self, q, k)
    q, k = rotated(q, *q_tables), rotated(k, *k_tables)
    q, k = (
        tap(f"{layer}.rotated_{name}", x.transpose(1, 2)).transpose(1, 2)
        for name, x in (("query", q), ("key", k))
    )
    k, v = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * self.scaling
    scores = scores.masked_fill(~visible.mask()[:, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    return self.o_proj((shares @ v).transpose(1, 2).reshape(B, S, -1)), None


def normed(layer: Any, q_BHSD: Tensor, k_BKSD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys after the layer's norms, if it has any: they take the heads last but one."""
    if not hasattr(layer, "q_norm"):
        return q_BHSD, k_BKSD
    q_BSHD, k_BSKD = layer.q_norm(q_BHSD.transpose(1, 2)), layer.k_norm(k_BKSD.transpose(1, 2))
    return q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2)


def rotated(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotates elements d and d + D/2 together."""
    cos, sin = cos_BSD[:, None], sin_BSD[:, None]
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos + torch.cat((-second, first), dim=-1) * sin
