"""Attention of rows in which a query sees all keys before it: torch's own function, which then takes a flash kernel.

The kernel aligns its causal mask to the first key. So a prefix gets queries of its own in front, whose output is dropped:
every token then stands at its own key.
"""

# B examples, T queries, X keys (those of a prefix in front), H heads, K kv heads, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtrain.attention.reference import repeated
from torchtrain.attention.visible import Visible


def attend(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float) -> Tensor:
    """Attention's output [B, H, T, D] where `visible.is_causal`."""
    return attend_causally(q_BHTD, k_BKXD, v_BKXD, front=visible.prefix, scale=scale)


def attend_causally(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, *, front: int, scale: float) -> Tensor:
    """Each query sees the keys up to its own, of which `front` stand before that of the first query."""
    if front:
        q_BHTD = F.pad(q_BHTD, (0, 0, front, 0))
    mixed = grouped_attention(q_BHTD, k_BKXD, v_BKXD, is_causal=True, scale=scale)
    return mixed[:, :, front:]


def grouped_attention(
    q_BHTD: Tensor,
    k_BKXD: Tensor,
    v_BKXD: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """torch's own function of grouped kv heads, which are repeated only for a kernel that takes no groups."""
    heads, kv_heads = q_BHTD.shape[1], k_BKXD.shape[1]
    is_grouped = heads != kv_heads
    if is_grouped and not _takes_groups(q_BHTD):
        k_BKXD, v_BKXD, is_grouped = repeated(k_BKXD, heads), repeated(v_BKXD, heads), False
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKXD, v_BKXD, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )


def _takes_groups(q_BHTD: Tensor) -> bool:
    """The flash kernels do, on a GPU for 16-bit types; of float32 torch would make all scores [T, X] there."""
    return q_BHTD.device.type == "cpu" or q_BHTD.dtype in (torch.bfloat16, torch.float16)
