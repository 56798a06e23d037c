"""What the queries of each row may see: facts about the batch, from which a kernel takes what it needs.

B batch, S positions of a row (with the virtual tokens of a prompt), P keys of a prefix, E of the S keys, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.layers import attention_mask, in_window


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments_BS", "positions_BS"),
    meta_fields=("prompt", "prefix", "window", "prefix_has_positions", "is_recorded"),
)
@dataclass(frozen=True, kw_only=True)
class Visible:
    """A query sees the keys at or before itself that are of its own segment or a virtual token's, and the whole prefix.

    `prompt` is how many of the S positions, the first ones, are virtual tokens, and `prefix` how many keys stand before those
    of the S. Of keys that have positions it sees those less than `window` before its own; those of a prefix are 0, 1, ... if
    it has them. `is_recorded` says that what attention gives at padding is recorded, which nothing else reads.
    """

    segments_BS: Array
    positions_BS: Array
    prompt: int = 0
    prefix: int = 0
    window: int | None = None
    prefix_has_positions: bool = True
    is_recorded: bool = False

    def mask(self, queries: Array | None = None, *, end: int | None = None) -> Array:
        """True [B, Q, P + E] where a query sees a key.

        `queries` [Q], or [B, Q] if each row has its own, are the places in the row of those that are asked for, and `end` is
        that of the first key that is not; None asks for all.
        """
        mask = attention_mask(self.segments_BS, queries, end)
        if self.window is not None and not self.prefix_has_positions:
            mask = in_window(mask, self.positions_BS, self.window, queries, end)
        if self.prefix:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (self.prefix, 0)), constant_values=True)
        if self.window is not None and self.prefix_has_positions:
            mask = in_window(mask, self.positions_BS, self.window, queries, end)
        return mask
