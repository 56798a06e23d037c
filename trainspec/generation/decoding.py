"""Decoding without a cache: each token computes its whole row anew. It is the definition of what a cache has to give."""

from __future__ import annotations

from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from trainspec.data import Batch
from trainspec.generation.rows import batch_of
from trainspec.step import Backend, S


class WholeRows(Generic[S]):
    """`Decoding` by the backend's whole forward pass, whatever the method, family and plan. `limit`: tokens of a row."""

    def __init__(self, backend: Backend[S], state: S, *, limit: int) -> None:
        self._backend, self._state, self._limit = backend, state, limit
        self._rows: list[list[int]] = []

    def begin(self, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row."""
        self._rows = [row[: end + 1].tolist() for row, end in zip(batch.input_ids, last, strict=True)]
        return self._backend.next_logits(self._state, batch, last)

    def extend(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after one more token [B] of each row; -1 for a row that has ended."""
        self._rows = [[*row, int(i)] if i >= 0 else [] for row, i in zip(self._rows, ids, strict=True)]
        batch, last = batch_of(self._rows, limit=self._limit, count=len(self._rows))
        return self._backend.next_logits(self._state, batch, last)
