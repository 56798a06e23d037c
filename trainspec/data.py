"""Deterministic batches for both backends.

The order is a function of (seed, epoch, position) and nothing else: no world size, no worker count, no state but
the step. Both backends slice the same global batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainspec.errors import DataError
from trainspec.methods import virtual_tokens
from trainspec.model import ModelSpec
from trainspec.recipe import Data, Recipe
from trainspec.rng import name_key, threefry2x32
from trainspec.runs.run import Run
from trainspec.text.store import COUNTS, TURN, Tokenizer, TokenStore, find_tokenizer, tokenise

# Hugging Face's and torch's mark for a position without loss.
IGNORED = -100
Ints = NDArray[np.int32]
# From this share of lost tokens on a user is warned.
MANY_LOST = 0.03


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


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a store, after the begin token at `begin` where a piece needs one of its own."""

    start: int
    stop: int
    begin: int | None = None

    @property
    def length(self) -> int:
        """How many tokens it has in a row."""
        return self.stop - self.start + (self.begin is not None)


@dataclass
class _Pieces:
    """What rows are made of, and what became of the rest. Tokens are lost where records are skipped or cut."""

    usable: list[Piece] = field(default_factory=list)
    too_long: int = 0
    lost_tokens: int = 0
    without_target: int = 0


class Dataset:
    """One split of the data as rows of `sequence_tokens`, each holding one record (padded) or several (packed)."""

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, data: Data, *, vocab: int, seed: int, where: str
    ) -> None:
        self._store, self._tokenizer, self._data, self._seed = store, tokenizer, data, seed
        self._pad = next((i for i in map(store.special, ("pad", "eos")) if i is not None and i < vocab), 0)
        found = _pieces(store, data)
        self._pieces = found.usable
        lengths = np.array([piece.length for piece in found.usable], np.int64)
        self._row_pieces = (
            _pack(lengths, data.sequence_tokens) if data.packing else [[i] for i in range(len(lengths))]
        )
        self.rows = len(self._row_pieces)
        self.summary = "\n".join(
            [_summary(store, found, data, self.rows, where), *self._warnings(found, vocab)]
        )
        if not found.usable:
            way_out = (
                "raise data.sequence_tokens or set data.too_long=cut"
                if found.too_long
                else "give records with a response"
            )
            raise DataError(f"{self.summary}; no usable record: {way_out}")
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def digest(self) -> str:
        """SHA-256 of what the file's records are to the model: their tokens, which of them count, and where each begins."""
        return self._store.digest

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return self._tokenizer.digest

    @property
    def records(self) -> int:
        """How many records became tokens."""
        return len(self._store.offsets) - 1

    def record(self, number: int) -> tuple[Ints, NDArray[np.bool_]]:
        """A record's tokens, uncut, and on which the loss is taken."""
        start, stop = (int(at) for at in self._store.offsets[number : number + 2])
        return np.array(self._store.tokens[start:stop]), _targets(self._store, self._data, Piece(start, stop))

    def batch(self, step: int, examples: int) -> Batch:
        """The global batch of update `step` (counted from 0); epochs follow one another without a gap."""
        positions = range(step * examples, (step + 1) * examples)
        return self._fill([int(self._order(p // self.rows)[p % self.rows]) for p in positions])

    def in_order(self, examples: int) -> Iterator[Batch]:
        """Every row once, in the file's order; the last batch is filled up with rows of padding."""
        for start in range(0, self.rows, examples):
            rows: list[int | None] = list(range(start, min(start + examples, self.rows)))
            yield self._fill(rows + [None] * (examples - len(rows)))

    def pieces(self, rows: list[Ints]) -> list[tuple[list[str], str]]:
        """Of each row of ids the vocabulary's words and the text, special tokens shown."""
        return self._tokenizer.pieces([ids.tolist() for ids in rows])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Sorting random words, ties broken by the index: integers only, equal on every platform.
        index = np.arange(self.rows, dtype=np.uint32)
        high, low = threefry2x32(name_key(self._seed, "order", str(epoch)), index, np.zeros_like(index))
        return np.lexsort((index, low, high))

    def _fill(self, rows: list[int] | list[int | None]) -> Batch:
        shape = (len(rows), self._data.sequence_tokens)
        input_ids = np.full(shape, self._pad, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            pieces = [] if row is None else [self._pieces[j] for j in self._row_pieces[row]]
            used = sum(piece.length for piece in pieces)
            at = shape[1] - used if self._data.padding_side == "left" else 0
            for number, piece in enumerate(pieces, 1):
                to = at + piece.length
                if piece.begin is not None:
                    input_ids[i, at] = self._store.tokens[piece.begin]
                real = slice(to - (piece.stop - piece.start), to)
                input_ids[i, real] = self._store.tokens[piece.start : piece.stop]
                targets = _targets(self._store, self._data, piece)
                labels[i, real] = np.where(targets, input_ids[i, real], IGNORED)
                positions[i, at:to] = np.arange(to - at)
                segments[i, at:to] = number
                at = to
        return Batch(input_ids, labels, positions, segments, np.arange(len(rows), dtype=np.int32))

    def _warnings(self, found: _Pieces, vocab: int) -> Iterator[str]:
        """What a user should know of the data, a line each."""
        about, limit, total = self._store.about, self._data.sequence_tokens, len(self._store.tokens)
        if found.lost_tokens > total * MANY_LOST:
            yield (
                f"warning: {100 * found.lost_tokens / total:.0f} % of the tokens are lost, in {found.too_long} records "
                f"longer than data.sequence_tokens={limit}; raise it, or set data.too_long=split"
            )
        if about["targets"] and not about["end_targets"] and self._data.loss_on == "completion":
            yield "warning: no end token is among the targets, so the model does not learn to stop; see how the chat template ends a turn"
        for note, count in about["notes"].items():
            yield f"warning: {count} of {about['records']} records: {note}"
        if about["bad"]:
            yield f"warning: skipped as bad: {'; '.join(about['bad'])}"
        pad = self._store.special("pad")
        if pad is not None and pad >= vocab:
            yield f"padding is {self._pad}: the tokenizer's padding token has id {pad}, the model {vocab} tokens (padding takes no part in training)"


def open_dataset(run: Run, split: Literal["train", "heldout"]) -> Dataset:
    """One split of the run's data. Raises DataError where a record is malformed or none is usable."""
    recipe, model, data = run.recipe, run.spec, run.recipe.data
    source = data.train if split == "train" else data.heldout
    if source is None:
        raise DataError("data.heldout: not given; it names the records to measure on")
    check_positions(recipe, model)
    tokenizer = find_tokenizer(data, run.directory, recipe.model.from_)
    store = tokenise(source, tokenizer, data)
    largest = int(store.about["largest"])
    if largest >= model.vocab:
        names = [
            f"its {name} token {text!r}"
            for name, (text, i) in store.about["special_tokens"].items()
            if i == largest
        ]
        raise DataError(
            f"{source}: {tokenizer.directory} gives it token {largest}{f', {names[0]}' if names else ''}; {model.name} has only "
            f"{model.vocab}; set data.tokenizer to the model's own"
        )
    return Dataset(store, tokenizer, data, vocab=model.vocab, seed=recipe.run.seed, where=source)


def check_positions(recipe: Recipe, model: ModelSpec) -> None:
    """Raises DataError where a row, with virtual tokens in front, has more positions than the model."""
    virtual = virtual_tokens(recipe.method)
    if recipe.data.sequence_tokens + virtual > model.max_positions:
        beside = f" and method.virtual_tokens={virtual}" if virtual else ""
        raise DataError(
            f"data.sequence_tokens={recipe.data.sequence_tokens}{beside}: {model.name} has {model.max_positions} positions"
        )


def _targets(store: TokenStore, data: Data, piece: Piece) -> NDArray[np.bool_]:
    """Which tokens of a piece the loss is taken on, its own begin token left out; never the first, which nothing precedes."""
    if data.loss_on == "all":
        targets = np.ones(piece.stop - piece.start, np.bool_)
    else:
        targets = (np.asarray(store.marks[piece.start : piece.stop]) & COUNTS) > 0
    if piece.begin is None:
        targets[:1] = False
    return targets


def _pieces(store: TokenStore, data: Data) -> _Pieces:
    """What rows are made of: whole records, and of those that do not fit what `too_long` says."""
    found, limit = _Pieces(), data.sequence_tokens
    bos = store.special("bos")
    for start, stop in pairwise(store.offsets.tolist()):
        pieces = [Piece(start, stop)]
        if stop - start > limit:
            found.too_long += 1
            match data.too_long:
                case "skip":
                    found.lost_tokens += stop - start
                    continue
                case "cut":
                    found.lost_tokens += stop - start - limit
                    pieces = [Piece(start, start + limit)]
                case "split":
                    pieces = list(_split(store, start, stop, limit, begins=store.tokens[start] == bos))
        kept = [piece for piece in pieces if _targets(store, data, piece).any()]
        found.without_target += len(pieces) - len(kept)
        found.usable += kept
    return found


def _split(store: TokenStore, start: int, stop: int, limit: int, *, begins: bool) -> Iterator[Piece]:
    """Pieces that fill a row or end where a turn does; those after the first have the record's begin token again."""
    at = start
    while at < stop:
        # In a row of one token there is no room for a begin token before another.
        begin = start if begins and at > start and limit > 1 else None
        room = limit - (begin is not None)
        to = min(at + room, stop)
        if to < stop:
            turns = np.flatnonzero(np.asarray(store.marks[at + 1 : to + 1]) & TURN)
            to = at + 1 + int(turns[-1]) if len(turns) else to
        yield Piece(at, to, begin)
        at = to


def _summary(store: TokenStore, found: _Pieces, data: Data, rows: int, where: str) -> str:
    """What the file has and what is made of it."""
    about = store.about
    filled = sum(piece.length for piece in found.usable)
    share = 100 * filled / max(1, rows * data.sequence_tokens)
    targets = sum(int(_targets(store, data, piece).sum()) for piece in found.usable)
    does = {"skip": "skipped", "cut": "cut", "split": "split"}[data.too_long]
    skipped = {"without a target": found.without_target, **about["skipped"]}
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    return (
        f"{where}: {about['records']} records make {len(found.usable)} pieces in {rows} rows of {data.sequence_tokens} "
        f"tokens, {share:.0f} % filled, {targets} targets; {found.too_long} too long ({does}); "
        f"skipped: {left_out or 'none'}"
    )


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
