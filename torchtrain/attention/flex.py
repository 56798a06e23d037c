"""Attention by torch's flex_attention: rows of several segments, windows, a prefix, in blocks of which empty ones are skipped.

For a GPU, where it is compiled. On a CPU torch has no backward pass of it.
"""

# B examples, T queries, X keys (P of a prefix in front), H heads, K kv heads, D head dim

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchtrain.attention.visible import Visible
from torchtrain.layers import VIRTUAL


def attend(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float) -> Tensor:
    """Attention's output [B, H, T, D]."""
    kernel = _compiled(flex_attention) if q_BHTD.is_cuda else flex_attention
    is_grouped = q_BHTD.shape[1] != k_BKXD.shape[1]
    block_mask = visible.once(make_block_mask)
    return kernel(q_BHTD, k_BKXD, v_BKXD, block_mask=block_mask, scale=scale, enable_gqa=is_grouped)


def make_block_mask(visible: Visible) -> BlockMask:
    """The blocks of queries and keys in which any query sees a key, and what it sees in each."""
    segments_BT = visible.segments_BT
    (B, T), device = segments_BT.shape, segments_BT.device
    make = _compiled(create_block_mask) if segments_BT.is_cuda else create_block_mask
    return make(sees(visible), B, None, T, visible.prefix + T, device=device)


def sees(visible: Visible) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query `q` of row `b` sees key `k`, as flex_attention asks: by index, also of each head."""
    prefix, window, has_positions = visible.prefix, visible.window, visible.prefix_has_positions
    segments_BT, positions_BT = visible.segments_BT, visible.positions_BT
    key_segments_BX = F.pad(segments_BT, (prefix, 0), value=VIRTUAL)
    prefix_BP = torch.arange(prefix, device=positions_BT.device).expand(len(positions_BT), -1)
    key_positions_BX = torch.cat((prefix_BP, positions_BT), 1)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        segment = key_segments_BX[b, k]
        seen = (k <= q + prefix) & ((segment == segments_BT[b, q]) | (segment == VIRTUAL))
        if window is None:
            return seen
        near = positions_BT[b, q] - key_positions_BX[b, k] < window
        return seen & near if has_positions else seen & (near | (k < prefix))

    return mask


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for the shapes of a run's batches."""
    return torch.compile(function, dynamic=False)
