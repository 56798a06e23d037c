"""Keys and values of rows that grow by a token at a time, and the attention of such a token over them.

Each row has its own slots: those of a prefix come first, then a prompt's, then its tokens'. What padding has left in a slot
stays until the row's own token takes its place: no token sees a slot after its own.
"""

# B rows, H heads, K kv heads, G heads of a kv head, X keys (of the slots in use), D head dim

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class OneToken:
    """One more token of each row, and what it sees: the keys up to its own slot, of which `used` are those of the longest row.

    `slots_B` is where its keys go in `rows_B`, and `shared_slot` the same where all rows have one. `mask_B11X` is added to the
    scores; without it all tokens see all `used` keys. `prompt` and `prefix` count the virtual tokens that the pass makes, as in
    `Visible`: none, as the cache has them.
    """

    rows_B: Tensor
    slots_B: Tensor
    shared_slot: int | None
    used: int
    mask_B11X: Tensor | None
    prompt: int = 0
    prefix: int = 0


def one_token(
    slots_B: NDArray[np.int64], *, window: int | None, always: int, dtype: torch.dtype, device: torch.device
) -> OneToken:
    """What tokens in these slots see: the keys less than `window` slots before their own, and the first `always`."""
    used, shortest = int(slots_B.max()) + 1, int(slots_B.min()) + 1
    is_shared, mask_B11X = used == shortest, None
    if not is_shared or (window is not None and used > window):
        before_BX = slots_B[:, None] - np.arange(used)
        hidden_BX = before_BX < 0
        if window is not None:
            hidden_BX |= (before_BX >= window) & (np.arange(used) >= always)
        hidden_B11X = torch.from_numpy(hidden_BX[:, None, None]).to(device)
        mask_B11X = torch.zeros(hidden_B11X.shape, dtype=dtype, device=device)
        mask_B11X.masked_fill_(hidden_B11X, -torch.inf)
    return OneToken(
        rows_B=torch.arange(len(slots_B), device=device),
        slots_B=torch.from_numpy(slots_B).to(device),
        shared_slot=used - 1 if is_shared else None,
        used=used,
        mask_B11X=mask_B11X,
    )


class Cache:
    """The keys and values of every layer, by its index, in `slots` of each row."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, layer: int, k_BKXD: Tensor, v_BKXD: Tensor) -> None:
        """Keep a layer's keys and values of the first X slots."""
        self._layers[layer] = self._kept(k_BKXD), self._kept(v_BKXD)

    def add(self, layer: int, k_BK1D: Tensor, v_BK1D: Tensor, token: OneToken) -> tuple[Tensor, Tensor]:
        """Keep those of one more token of each row; gives the keys and values [B, K, X, D] of all slots in use."""
        assert token.used <= self._slots
        k, v = self._layers[layer]
        for kept, new_BK1D in ((k, k_BK1D), (v, v_BK1D)):
            if token.shared_slot is not None:
                kept.narrow(2, token.shared_slot, 1).copy_(new_BK1D)
            else:
                kept[token.rows_B, :, token.slots_B] = new_BK1D[:, :, 0]
        return k.narrow(2, 0, token.used), v.narrow(2, 0, token.used)

    def _kept(self, x_BKXD: Tensor) -> Tensor:
        B, K, X, D = x_BKXD.shape
        # Zeros, as what no token sees has a weight of 0, which makes no number of an infinite value.
        kept = x_BKXD.new_zeros(B, K, self._slots, D)
        kept[:, :, :X] = x_BKXD
        return kept


def attend(q_BH1D: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, token: OneToken, *, scale: float) -> Tensor:
    """Attention's output [B, H, 1, D]. The heads of a kv head are as many queries of it, so that no key is repeated."""
    (B, H, _, D), K = q_BH1D.shape, k_BKXD.shape[1]
    q_BKGD = q_BH1D.reshape(B, K, H // K, D)
    mixed_BKGD = F.scaled_dot_product_attention(
        q_BKGD, k_BKXD, v_BKXD, attn_mask=token.mask_B11X, scale=scale
    )
    return mixed_BKGD.reshape(B, H, 1, D)
