"""Prompts and what was generated of them as the rows of a batch, and where each row stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainspec.data import IGNORED, Batch
from trainspec.errors import DataError
from trainspec.methods import position_shift
from trainspec.runs.run import Run

# Rows are padded to a multiple of this many tokens, so that a compiled program serves as many steps.
STRETCH = 64


def room(run: Run) -> int:
    """How many tokens a row may have: the model's positions but for those of virtual tokens."""
    return run.spec.max_positions - position_shift(run.recipe.method)


def check_vocabulary(ids: Iterable[int], run: Run, what: str) -> None:
    """Raises DataError where `what` has a token that the model has not."""
    largest = max(ids)
    if largest >= run.spec.vocab:
        raise DataError(
            f"{what} has token {largest}: {run.spec.name} has {run.spec.vocab}; set data.tokenizer to the model's own"
        )


def batch_of(rows: Sequence[Sequence[int]], *, limit: int, count: int) -> tuple[Batch, NDArray[np.int32]]:
    """Rows of token ids as a batch, padded on the right, and the position [B] of each row's last token.

    No row is padded beyond `limit` tokens. The batch has `count` rows, however many are given: an empty row, and those that fill
    it up, have one token.
    """
    longest = max(1, *map(len, rows))
    length = min(-(-longest // STRETCH) * STRETCH, max(limit, longest))
    input_ids, segments = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    segments[:, 0] = 1
    last = np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], segments[i, : len(row)] = row, 1
        last[i] = max(0, len(row) - 1)
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32), 0).astype(np.int32)
    labels = np.full((count, length), IGNORED, np.int32)
    return Batch(input_ids, labels, positions, segments, np.arange(count, dtype=np.int32)), last
