"""Deterministic batches for both backends.

The order is a function of (seed, epoch, position) and nothing else: no world size, no worker count, no state but
the step. Both backends slice the same global batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainspec.errors import DataError
from trainspec.hf import resolve_model
from trainspec.methods import virtual_tokens
from trainspec.recipe import Data, Recipe
from trainspec.rng import name_key, threefry2x32
from trainspec.tokens import TextCodec, TokenStore, read_codec, tokenise

# Hugging Face's and torch's mark for a position without loss.
IGNORED = -100
Ints = NDArray[np.int32]
# From this share of skipped records on a person is warned.
MANY_SKIPPED = 0.1


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: int32 arrays of shape [examples, sequence_tokens], and `rows` of shape [examples].

    `labels` stand at the same positions as the inputs (the shift is inside the loss) and are -100 where there is no
    loss, always so on the first token of a document. `positions` restart with every document. `segments` is 0 on
    padding and 1, 2, ... on the documents of a row. `rows` is each example's index in its global batch.
    """

    input_ids: Ints
    labels: Ints
    positions: Ints
    segments: Ints
    rows: Ints

    @property
    def target_tokens(self) -> int:
        """How many tokens the loss is taken on."""
        return int((self.labels != IGNORED).sum())

    def split(self, parts: int) -> tuple[Batch, ...]:
        """`parts` equal batches of consecutive rows."""
        columns = [np.split(getattr(self, f.name), parts) for f in fields(self)]
        return tuple(Batch(*arrays) for arrays in zip(*columns, strict=True))


class Dataset:
    """One split of the data as rows of `sequence_tokens`, each holding one record (padded) or several (packed)."""

    def __init__(self, store: TokenStore, codec: TextCodec, data: Data, *, seed: int, where: str) -> None:
        self._store, self._codec, self._data, self._seed = store, codec, data, seed
        spans, skipped, cut, masked = _usable_spans(store, data)
        records = len(store.offsets) - 1 + store.num_empty
        self.summary = (
            f"{where}: {records} records make {len(spans)} pieces, {cut} cut, "
            f"skipped: {skipped} too long, {store.num_empty} empty, {masked} without a target"
        )
        if skipped > records * MANY_SKIPPED:
            self.summary += f"\nwarning: {skipped} of {records} records are longer than data.sequence_tokens={data.sequence_tokens} and skipped; raise it, or set data.too_long=cut or split"
        if not len(spans):
            way_out = (
                "raise data.sequence_tokens or set data.too_long=cut"
                if skipped
                else "give records with a response"
            )
            raise DataError(f"{self.summary}; no usable record: {way_out}")
        self._spans = spans
        lengths = spans[:, 1] - spans[:, 0]
        self._row_spans = (
            _pack(lengths, data.sequence_tokens) if data.packing else [[i] for i in range(len(spans))]
        )
        self.rows = len(self._row_spans)
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def digest(self) -> str:
        """SHA-256 of what the file's records are to the model: their tokens, which of them count, and where each begins."""
        return self._store.digest

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return self._codec.digest

    def batch(self, step: int, examples: int) -> Batch:
        """The global batch of update `step` (counted from 0); epochs follow one another without a gap."""
        positions = range(step * examples, (step + 1) * examples)
        return self._fill([int(self._order(p // self.rows)[p % self.rows]) for p in positions])

    def in_order(self, examples: int) -> Iterator[Batch]:
        """Every row once, in the file's order; the last batch is filled up with rows of padding."""
        for start in range(0, self.rows, examples):
            rows: list[int | None] = list(range(start, min(start + examples, self.rows)))
            yield self._fill(rows + [None] * (examples - len(rows)))

    def decode(self, ids: Ints) -> str:
        """The text of `ids`, special tokens shown."""
        return self._codec.decode(ids)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Sorting random words, ties broken by the index: integers only, equal on every platform.
        index = np.arange(self.rows, dtype=np.uint32)
        high, low = threefry2x32(name_key(self._seed, "order", str(epoch)), index, np.zeros_like(index))
        return np.lexsort((index, low, high))

    def _fill(self, rows: list[int] | list[int | None]) -> Batch:
        shape = (len(rows), self._data.sequence_tokens)
        input_ids = np.full(shape, self._codec.pad, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            spans = [] if row is None else [self._spans[j] for j in self._row_spans[row]]
            used = sum(int(stop - start) for start, stop in spans)
            at = shape[1] - used if self._data.padding_side == "left" else 0
            for number, (start, stop) in enumerate(spans, 1):
                to = at + int(stop - start)
                input_ids[i, at:to] = self._store.tokens[start:stop]
                labels[i, at:to] = np.where(
                    _targets(self._store, self._data, start, stop), input_ids[i, at:to], IGNORED
                )
                positions[i, at:to] = np.arange(to - at)
                segments[i, at:to] = number
                at = to
        return Batch(input_ids, labels, positions, segments, np.arange(len(rows), dtype=np.int32))


def open_dataset(recipe: Recipe, split: Literal["train", "heldout"]) -> Dataset:
    """One split of the recipe's data. Raises DataError where a record is malformed or none is usable."""
    model, directory = resolve_model(recipe.model)
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else directory
    if tokenizer is None:
        raise DataError(
            f"data.tokenizer: {recipe.model.from_} has no tokenizer; name a directory with a tokenizer.json"
        )
    path = recipe.data.train if split == "train" else recipe.data.heldout
    if path is None:
        raise DataError("data.heldout: not given; it names the records to measure on")
    codec = read_codec(tokenizer)
    virtual = virtual_tokens(recipe.method)
    if recipe.data.sequence_tokens + virtual > model.max_positions:
        beside = f" and method.virtual_tokens={virtual}" if virtual else ""
        raise DataError(
            f"data.sequence_tokens={recipe.data.sequence_tokens}{beside}: {model.name} has {model.max_positions} positions"
        )
    store = tokenise(Path(path), codec, task=recipe.data.task, cache=Path(recipe.data.cache))
    largest = int(store.tokens.max(initial=0))
    if largest >= model.vocab:
        raise DataError(f"{path}: {tokenizer} gives it token {largest}, {model.name} has only {model.vocab}")
    return Dataset(store, codec, recipe.data, seed=recipe.run.seed, where=path)


def _targets(store: TokenStore, data: Data, start: int, stop: int) -> NDArray[np.bool_]:
    """Which tokens of a span the loss is taken on; never the first, which nothing precedes."""
    targets = np.ones(stop - start, np.bool_) if data.loss_on == "all" else np.array(store.counts[start:stop])
    targets[0] = False
    return targets


def _usable_spans(store: TokenStore, data: Data) -> tuple[NDArray[np.int64], int, int, int]:
    """Token ranges [n, 2] that rows are made of, and how many records were skipped as too long, cut, and
    skipped as fully masked."""
    limit, skipped, cut, masked = data.sequence_tokens, 0, 0, 0
    spans: list[tuple[int, int]] = []
    for start, stop in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
        pieces = [(start, stop)]
        if stop - start > limit:
            if data.too_long == "skip":
                skipped += 1
                continue
            cut += 1
            ends = range(start, stop, limit) if data.too_long == "split" else (start,)
            pieces = [(at, min(at + limit, stop)) for at in ends]
        kept = [(at, to) for at, to in pieces if _targets(store, data, at, to).any()]
        masked += not kept
        spans += kept
    return np.array(spans, np.int64).reshape(-1, 2), skipped, cut, masked


def _pack(lengths: NDArray[np.int64], limit: int) -> list[list[int]]:
    """Spans by row, best fit with the longest first: each goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for span in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[span])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([])
            left, row = limit, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(span)
        bisect.insort(room, (left - length, row))
    return rows
