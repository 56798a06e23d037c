"""What the queries of each row may see: facts about a microbatch, from which a kernel takes what it needs.

B examples, S tokens, T positions of a layer (a prompt's virtual tokens and the S), X keys (a prefix's and those of the T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from torchtrain.layers import attention_mask, in_window


class SegmentStretch(NamedTuple):
    """Tokens next to each other in a row that are of one segment; `reach` is one more than the largest of their positions."""

    tokens: int
    reach: int
    is_padding: bool


# The stretches of each row, in their order. Known to the host before a batch is on its device: no kernel has to ask there.
Rows = tuple[tuple[SegmentStretch, ...], ...]


def rows_of(segments_BS: NDArray[Any], positions_BS: NDArray[Any], *, shift: int = 0) -> Rows:
    """The stretches of a microbatch, whose layers add `shift` to the positions."""
    return tuple(
        tuple(_stretches(segments_S, positions_S, shift))
        for segments_S, positions_S in zip(segments_BS, positions_BS, strict=True)
    )


def _stretches(segments_S: NDArray[Any], positions_S: NDArray[Any], shift: int) -> list[SegmentStretch]:
    begins = np.flatnonzero(np.diff(segments_S, prepend=segments_S[0] - 1))
    ends = np.append(begins[1:], len(segments_S))
    return [
        SegmentStretch(
            int(end - begin), int(positions_S[begin:end].max()) + 1 + shift, bool(segments_S[begin] == 0)
        )
        for begin, end in zip(begins, ends, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Visible:
    """A query sees the keys at or before itself that are of its own segment or a virtual token's, and the whole prefix.

    `prompt` is how many of the T positions, the first ones, are virtual tokens, and `prefix` how many keys stand before those
    of the T. Of keys that have positions it sees those less than `window` before its own; those of a prefix are 0, 1, ... if
    it has them. `is_recorded` says that what attention gives at padding is recorded, which nothing else reads.
    """

    segments_BT: Tensor
    positions_BT: Tensor
    rows: Rows
    prompt: int = 0
    prefix: int = 0
    window: int | None = None
    prefix_has_positions: bool = True
    is_recorded: bool = False
    _made: dict[Callable[[Visible], Any], Any] = field(default_factory=dict, init=False)

    def once(self, make: Callable[[Visible], Any]) -> Any:
        """What `make` gives for this microbatch: for its first layer it is made, for the others it is there."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def mask(self) -> Tensor:
        """True [B, T, X] where a query sees a key."""
        mask = attention_mask(self.segments_BT)
        if self.window is not None and not self.prefix_has_positions:
            mask = in_window(mask, self.positions_BT, self.window)
        if self.prefix:
            mask = F.pad(mask, (self.prefix, 0), value=True)
        if self.window is not None and self.prefix_has_positions:
            mask = in_window(mask, self.positions_BT, self.window)
        return mask

    def hides(self, stretch: SegmentStretch) -> bool:
        """Whether the window hides any key from a token of `stretch`."""
        return self.window is not None and stretch.reach > self.window

    @property
    def is_causal(self) -> bool:
        """Whether no query that counts sees anything but all keys at or before its own, the prefix among them.

        Padding after a row's only segment may see that segment: nothing sees it, and its own output is in no loss, so its
        gradient is zero and adds none to any weight. Where it is recorded it has to see what the definition says.
        """
        return all(self._is_causal(row) for row in self.rows)

    def _is_causal(self, row: tuple[SegmentStretch, ...]) -> bool:
        if any(map(self.hides, row)):
            return False
        return len(row) == 1 or (len(row) == 2 and row[1].is_padding and not self.is_recorded)
