"""The kernel that fits a microbatch best, of those that keep no score: what it needs of a mask the host knows."""

# B examples, T queries, X keys, H heads, K kv heads, D head dim

from __future__ import annotations

from torch import Tensor

from torchtrain.attention import causal, flex, segments
from torchtrain.attention.visible import Visible


def attend(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float) -> Tensor:
    """Attention's output [B, H, T, D]."""
    kernel = causal if visible.is_causal else flex if q_BHTD.is_cuda else segments
    return kernel.attend(q_BHTD, k_BKXD, v_BKXD, visible, scale=scale)
