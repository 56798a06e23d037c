"""Rows that are decoded with a cache and as whole rows, and how far their logits are apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtrain import step
from trainspec.data import open_dataset
from trainspec.generation.decoding import WholeRows
from trainspec.generation.rows import batch_of

# Rows of different lengths. The longest outgrows a window of 16, the second ends after two tokens.
ROWS = [[1, 7, 9, 30, 4], [1, 5], [1, 300, 12, *range(40, 52)], [1, 8, 8]]
ADDED = [[11, 12, 13, 14], [21, 22, 23, 24], [31, -1, 33, 34], [41, -1, 43, 44], [51, -1, 53, 54]]
LENGTH = len(ROWS[2]) + len(ADDED)  # no multiple of anything, and all that is needed


def moved(state: step.State, *, lr: float = 0.05) -> step.State:
    """The state after an update that no method begins without: LoRA's B is no longer zero."""
    examples = state.run.recipe.batch.global_examples
    state, _ = step.train_step(state, open_dataset(state.run, "train").batch(0, examples), lr=lr)
    return state


def both(state: step.State, *, length: int = LENGTH) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The logits of rows that go on, cached and of whole rows, at their beginning and after each token."""
    cached, limit = step.decoding(state, length=length), state.run.spec.max_positions
    assert cached is not None
    whole = WholeRows(step, state, limit=limit)
    batch, last = batch_of(ROWS, limit=limit, count=len(ROWS))
    yield cached.begin(batch, last), whole.begin(batch, last)
    for ids in np.array(ADDED, np.int32):
        going = ids >= 0
        yield cached.extend(ids)[going], whole.extend(ids)[going]


def apart(state: step.State, *, length: int = LENGTH) -> float:
    """The largest difference of a logit, as a share of the largest logit."""
    pairs = list(both(state, length=length))
    wide = [tuple(logits.astype(np.float64) for logits in pair) for pair in pairs]
    return float(np.max([np.abs(found - wanted).max() / np.abs(wanted).max() for found, wanted in wide]))
