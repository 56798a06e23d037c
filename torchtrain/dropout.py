"""Dropout with shared masks: the rounds of trainspec/rng.py on torch tensors, bit for bit.

torch lacks some uint32 operations, so words are int32: additions wrap in the same way, a mask makes a right shift
logical, and flipping the top bit makes a signed comparison unsigned.
"""

# B examples, S sequence, F features

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainspec.rng import PARITY_CONSTANT, ROTATIONS, drop_threshold, fold, name_key


class Stretch(NamedTuple):
    """Positions [first, first + S) of rows that have `positions`: what a module sees that is given a part of each row."""

    first: int
    positions: int


@dataclass
class DropoutPoint:
    """Where a run is: the update (from 0) and the rows [B] of the global batch that are in the model now.

    `first_feature` is, for each module whose input is split, the first feature of this process's shard. `stretch` says which
    positions of the rows a module is given; None is all of them.

    Differs from jaxtrain, where it is an argument of the forward pass: here PEFT's layers call dropout, so one shared
    object is moved before each microbatch.
    """

    step: int = 0
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    first_feature: dict[str, int] = field(default_factory=dict)
    stretch: Stretch | None = None


def keep_mask(
    key: tuple[int, int], *, step: int, rows: Tensor, sequence_tokens: int, features: int, rate: float,
    first_feature: int = 0, stretch: Stretch | None = None,
) -> Tensor:  # fmt: skip
    """True where an element of a module's input is kept; bool [B, S, F].

    `key` is of (seed, module); `step` counts from 0; `rows` [B] are the examples' rows in the global batch. An element's
    bits depend on (key, step, row, position, feature) alone: a mask is the same however the batch is split into
    microbatches or over processes, and when it is recomputed. A process that holds features [first_feature,
    first_feature + F) of an input draws the mask of those. Differs from jaxtrain, where the compiler splits whole masks. x is
    S positions of each row: a `stretch` of them, or all.
    """
    device = rows.device
    feature_F = torch.arange(first_feature, first_feature + features, dtype=torch.int32, device=device)
    position_S = torch.arange(sequence_tokens, dtype=torch.int32, device=device)
    if stretch is not None:
        position_S, sequence_tokens = position_S + stretch.first, stretch.positions
    element_BS = rows.to(torch.int32)[:, None] * sequence_tokens + position_S
    bits_BSF = _threefry_first_word(fold(key, step), feature_F, element_BS[:, :, None])
    return bits_BSF.bitwise_xor_(_int32(1 << 31)) >= drop_threshold(rate) - (1 << 31)


class CounterDropout(nn.Module):
    """x / (1 - rate) where the mask of (seed, module, step, row, position, feature) keeps x, else 0.

    A recomputed forward pass draws the same mask, as the point moves only between microbatches. Off in eval mode. A
    `shared` input belongs to no example: all microbatches and replicas draw the mask of row 0.
    """

    def __init__(
        self, module: str, *, seed: int, rate: float, point: DropoutPoint, shared: bool = False
    ) -> None:
        super().__init__()
        self.rate = rate
        self._module = module
        self._key = name_key(seed, "dropout", module)
        self._point = point
        self._shared = shared

    def forward(self, x_BSF: Tensor) -> Tensor:
        """The same shape and type."""
        if not self.training:
            return x_BSF
        examples, sequence_tokens, features = x_BSF.shape
        keep_BSF = keep_mask(
            self._key,
            step=self._point.step,
            rows=x_BSF.new_zeros(examples, dtype=torch.int32) if self._shared else self._point.rows,
            sequence_tokens=sequence_tokens,
            features=features,
            rate=self.rate,
            first_feature=self._point.first_feature.get(self._module, 0),
            stretch=self._point.stretch,
        )
        return torch.where(keep_BSF, x_BSF / (1.0 - self.rate), 0.0)


def _threefry_first_word(key: tuple[int, int], counter0: Tensor, counter1: Tensor) -> Tensor:
    """The first of the two words of Threefry-2x32; counters are int32 and broadcast against each other."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ PARITY_CONSTANT)
    x0, x1 = torch.broadcast_tensors(counter0 + _int32(keys[0]), counter1 + _int32(keys[1]))
    x0, x1 = x0.contiguous(), x1.contiguous()
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x0.add_(x1)
            high = x1 << rotation
            x1.bitwise_right_shift_(32 - rotation).bitwise_and_((1 << rotation) - 1)
            x1.bitwise_or_(high).bitwise_xor_(x0)
        x0.add_(_int32(keys[(block + 1) % 3]))
        x1.add_(_int32(keys[(block + 2) % 3] + block + 1))
    return x0


def _int32(word: int) -> int:
    """The int32 with the low 32 bits of `word`."""
    return ((word + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
