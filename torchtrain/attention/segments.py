"""Attention segment by segment: each stretch of a row by itself, with the virtual tokens in front of its own keys.

For a CPU, where a call costs little: no mask is made but that of a window, and no score between two segments.
"""

# B examples, T queries, X keys (F virtual ones in front), t tokens of a stretch, H heads, K kv heads, D head dim

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtrain.attention.causal import attend_causally, grouped_attention
from torchtrain.attention.visible import SegmentStretch, Visible

# Queries that share a mask, where the window is no larger.
_CHUNK = 128


def attend(q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float) -> Tensor:
    """Attention's output [B, H, T, D]."""
    mixed = [
        torch.cat(list(_row(q, k, v, row, visible, scale)), 2)
        for q, k, v, row in zip(q_BHTD.split(1), k_BKXD.split(1), v_BKXD.split(1), visible.rows, strict=True)
    ]
    return torch.cat(mixed)


def _row(
    q_1HTD: Tensor,
    k_1KXD: Tensor,
    v_1KXD: Tensor,
    row: tuple[SegmentStretch, ...],
    visible: Visible,
    scale: float,
) -> Iterator[Tensor]:
    """The outputs of a row's virtual tokens, if it has such queries, and of its stretches."""
    tokens = [stretch.tokens for stretch in row]
    front = visible.prefix + visible.prompt
    # Cut once: the backward pass joins the pieces once, where slices would each fill a tensor of the whole row.
    virtual_q, *qs = q_1HTD.split([visible.prompt, *tokens], 2)
    (virtual_k, *ks), (virtual_v, *vs) = (x.split([front, *tokens], 2) for x in (k_1KXD, v_1KXD))
    if visible.prompt:
        virtual = SegmentStretch(visible.prompt, visible.prompt, is_padding=False)
        nothing = virtual_k[:, :, :0]
        yield _stretch(virtual_q, (nothing, virtual_k), (nothing, virtual_v), virtual, visible, scale)
    for stretch, q, k, v in zip(row, qs, ks, vs, strict=True):
        yield _stretch(q, (virtual_k, k), (virtual_v, v), stretch, visible, scale)


def _stretch(
    q_1HtD: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    stretch: SegmentStretch,
    visible: Visible,
    scale: float,
) -> Tensor:
    """The output [1, H, t, D] of a stretch; keys and values are the virtual tokens' and its own."""
    front = keys[0].shape[2]
    if not visible.hides(stretch):
        return attend_causally(q_1HtD, torch.cat(keys, 2), torch.cat(values, 2), front=front, scale=scale)
    assert visible.window is not None
    if stretch.is_padding:
        # All of it is at one position, from which the window hides the first virtual tokens alone.
        hidden = stretch.reach - visible.window
        keys, values = ((virtual[:, :, hidden:], own) for virtual, own in (keys, values))
        seen = front - hidden
        return attend_causally(q_1HtD, torch.cat(keys, 2), torch.cat(values, 2), front=seen, scale=scale)
    if not front or visible.prefix_has_positions:
        # Virtual tokens at positions 0, 1, ... are the beginning of the segment.
        q = F.pad(q_1HtD, (0, 0, front, 0))
        return _in_window(q, torch.cat(keys, 2), torch.cat(values, 2), (), visible.window, scale)[
            :, :, front:
        ]
    return _in_window(q_1HtD, keys[1], values[1], (keys[0], values[0]), visible.window, scale)


def _in_window(
    q_1HtD: Tensor, k_1KtD: Tensor, v_1KtD: Tensor, always: tuple[Tensor, ...], window: int, scale: float
) -> Tensor:
    """Chunk after chunk of queries, each against its own keys and those of the chunk before; `always` is seen by all."""
    chunk = max(window, _CHUNK)
    mixed, ks, vs = [], k_1KtD.split(chunk, 2), v_1KtD.split(chunk, 2)
    for i, q in enumerate(q_1HtD.split(chunk, 2)):
        near = slice(max(i - 1, 0), i + 1)
        k, v = torch.cat((*always[:1], *ks[near]), 2), torch.cat((*always[1:], *vs[near]), 2)
        # Query a of this chunk stands at key a + chunk of the two.
        both = q.new_ones(q.shape[2], chunk + q.shape[2], dtype=torch.bool)
        mask = both.tril(chunk).triu(chunk - window + 1)[:, 0 if i else chunk :]
        mask = F.pad(mask, (always[0].shape[2] if always else 0, 0), value=True)
        mixed.append(grouped_attention(q, k, v, mask=mask, scale=scale))
    return torch.cat(mixed, 2)
