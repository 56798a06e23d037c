"""The definition of attention: one dense mask for every layer, and torch's own function of it."""

# B examples, T queries, X keys, H heads, K kv heads, D head dim

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchtrain.attention.visible import Visible


def attend(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float) -> Tensor:
    """Attention's output [B, H, T, D]; softmax in the accumulation type."""
    k_BHXD, v_BHXD = repeated(k_BKXD, q_BHTD.shape[1]), repeated(v_BKXD, q_BHTD.shape[1])
    mask_B1TX = visible.once(Visible.mask)[:, None]
    return F.scaled_dot_product_attention(q_BHTD, k_BHXD, v_BHXD, attn_mask=mask_B1TX, scale=scale)


def repeated(x_BKXD: Tensor, heads: int) -> Tensor:
    """Keys or values of every head, each kv head's for its group of heads."""
    groups = heads // x_BKXD.shape[1]
    return x_BKXD if groups == 1 else x_BKXD.repeat_interleave(groups, dim=1)
