"""Decoding with a cache: the rows once, then a token of each at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchtrain.attention.cache import Cache, one_token
from torchtrain.engines.engine import Inputs
from torchtrain.mesh import Peers, compute_device
from torchtrain.methods.dora import Norms, computed_once
from torchtrain.precision import compute_dtype
from trainspec.data import Batch
from trainspec.methods import leading_positions, position_shift, virtual_tokens
from trainspec.runs.run import Run

# What a pass gives: the logits [B, vocab] of all replicas' rows.
Begin = Callable[[Batch, NDArray[np.int32], Cache], NDArray[Any]]
Extend = Callable[[Inputs], NDArray[Any]]


class CachedRows:
    """`Decoding` for rows of up to `length` tokens. `begin` makes the pass over rows, `extend` that over a token of each.

    A replica keeps its own rows, and a tensor peer its own heads. Differs from jaxtrain: it has no weights, which are in the model.
    """

    def __init__(self, run: Run, replicas: Peers, *, length: int, begin: Begin, extend: Extend) -> None:
        self._run, self._replicas, self._length = run, replicas, length
        self._begin, self._extend = begin, extend
        self._virtual = virtual_tokens(run.recipe.method)
        self._cache = Cache(self._virtual + length)
        self._last_B = np.zeros(0, np.int64)
        self._norms: Norms = {}

    def begin(self, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row; what is kept of other rows is forgotten."""
        self._last_B = self._own(last).astype(np.int64)
        # Padding costs time, but where kernels are compiled other lengths cost more.
        tokens = int(last.max()) + 1 if compute_device().type == "cpu" else self._length
        cut = {
            name: np.ascontiguousarray(array[:, :tokens])
            for name, array in vars(batch).items()
            if array.ndim > 1
        }
        self._norms = {}
        with computed_once(self._norms):
            return self._begin(replace(batch, **cut), last, self._cache)

    def extend(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after one more token [B] of each row. A row that has ended (-1) has token 0 in its last slot."""
        ids_B, method = self._own(ids), self._run.recipe.method
        self._last_B = self._last_B + (ids_B >= 0)
        has_positions = position_shift(method) > 0
        device = compute_device()
        token = one_token(
            self._virtual + self._last_B,
            window=self._run.spec.window,
            always=0 if has_positions else self._virtual - leading_positions(method),
            dtype=compute_dtype(self._run.recipe.precision.policy),
            device=device,
        )
        positions_B = self._last_B + position_shift(method)
        inputs: Inputs = {
            "input_ids": torch.from_numpy(ids_B.clip(0).astype(np.int64))[:, None].to(device),
            "position_ids": torch.from_numpy(positions_B)[:, None].to(device),
            "visible": token,
            "cache": self._cache,
        }
        with computed_once(self._norms):
            return self._extend(inputs)

    def _own(self, rows_B: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of this replica."""
        return np.split(rows_B, self._replicas.size)[self._replicas.index]
