"""Deterministic batches for both backends.

The order is a function of (seed, epoch, position) alone: not of the world size or a number of workers, and with no
state but the step. Both backends slice the same global batch.
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
from trainspec.methods import position_shift
from trainspec.model import ModelSpec
from trainspec.recipe import Data, Recipe
from trainspec.rng import name_key, threefry2x32
from trainspec.runs.run import Run
from trainspec.tasks import PromptForm
from trainspec.text.prompt_file import read_prompt
from trainspec.text.store import (
    COUNTS,
    TURN,
    Tokenizer,
    TokenStore,
    check_tokens,
    find_tokenizer,
    tokenise,
)

# Hugging Face's and torch's mark for a position without loss.
IGNORED = -100
Ints = NDArray[np.int32]
Split = Literal["train", "heldout"]
# The share of lost tokens from which the user is warned.
MANY_LOST = 0.03


@dataclass(frozen=True)
class Batch:
    """Examples as tokens: int32 arrays of shape [examples, sequence_tokens], and `rows` of shape [examples].

    `labels` are aligned with the inputs (the shift is inside the loss) and -100 where no loss is taken, as on the first
    token of every segment. `positions` restart in every segment. `segments` is 0 on padding and 1, 2, ... on an
    example's segments. `rows` is each example's row in its global batch.
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

    @property
    def tokens(self) -> int:
        """How many tokens there are, without padding."""
        return int(np.count_nonzero(self.segments))

    def split(self, count: int) -> tuple[Batch, ...]:
        """`count` equal batches of consecutive examples."""
        columns = [np.split(getattr(self, f.name), count) for f in fields(Batch)]
        return tuple(Batch(*arrays) for arrays in zip(*columns, strict=True))


class Segment(NamedTuple):
    """Tokens `start` to `stop` of a store. One that is split off begins with a copy of the token at `begin`."""

    start: int
    stop: int
    begin: int | None = None

    @property
    def length(self) -> int:
        """How many tokens it takes in an example."""
        return self.stop - self.start + (self.begin is not None)


@dataclass
class _Segments:
    """What examples are made of, and what was left out. Tokens are lost where records are skipped or cut."""

    usable: list[Segment] = field(default_factory=list)
    too_long: int = 0
    lost_tokens: int = 0
    without_target: int = 0


class Dataset:
    """One split of the data as examples of `sequence_tokens`: one segment each (padded) or several (packed)."""

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, data: Data, *, vocab: int, seed: int, where: str
    ) -> None:
        self._store, self._tokenizer, self._data, self._seed = store, tokenizer, data, seed
        self._pad = next((i for i in map(store.special, ("pad", "eos")) if i is not None and i < vocab), 0)
        segments = _segments(store, data)
        self._segments = segments.usable
        lengths = np.array([segment.length for segment in segments.usable], np.int64)
        self._example_segments = (
            _pack(lengths, data.sequence_tokens) if data.packing else [[i] for i in range(len(lengths))]
        )
        self.num_examples = len(self._example_segments)
        self.summary = "\n".join(
            [_summary(store, segments, data, self.num_examples, where), *self._warnings(segments, vocab)]
        )
        if not store.about["records"]:
            raise DataError(f"{where}: has no record; give one in each line, or name another file")
        if not segments.usable:
            way_out = (
                "raise data.sequence_tokens or set data.too_long=cut"
                if segments.too_long
                else "give records with a response"
            )
            raise DataError(f"{self.summary}; no usable record: {way_out}")
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def digest(self) -> str:
        """SHA-256 of all that training sees of the file: tokens, target marks and where each record begins."""
        return self._store.digest

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return self._tokenizer.digest

    @property
    def prompt(self) -> PromptForm | None:
        """How the file's instruction records are asked; None where it has none."""
        return read_prompt(self._data) if self._store.about["asked"] else None

    @property
    def has_answers(self) -> bool:
        """Whether the file has prompts with answers, as texts, which a task's metrics can judge."""
        return self._store.about["answered"] > 0

    @property
    def records(self) -> int:
        """How many records became tokens."""
        return len(self._store.offsets) - 1

    def record(self, number: int) -> tuple[Ints, NDArray[np.bool_]]:
        """A record's tokens, uncut, and which of them are targets."""
        start, stop = (int(offset) for offset in self._store.offsets[number : number + 2])
        return np.array(self._store.tokens[start:stop]), _targets(
            self._store, self._data, Segment(start, stop)
        )

    def batch(self, step: int, examples: int) -> Batch:
        """The global batch of update `step`, counted from 0; a batch may span two epochs."""
        positions = range(step * examples, (step + 1) * examples)
        return self._fill(
            [int(self._order(p // self.num_examples)[p % self.num_examples]) for p in positions]
        )

    def in_order(self, examples: int) -> Iterator[Batch]:
        """Every example once, in the file's order; the last batch is filled up with padding."""
        for start in range(0, self.num_examples, examples):
            numbers: list[int | None] = list(range(start, min(start + examples, self.num_examples)))
            yield self._fill(numbers + [None] * (examples - len(numbers)))

    def pieces(self, sequences: list[Ints]) -> list[tuple[list[str], str]]:
        """The vocabulary pieces and the text of each sequence of ids, special tokens included."""
        return self._tokenizer.pieces([ids.tolist() for ids in sequences])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Sorting random words, ties broken by the index: integers only, equal on every platform.
        index = np.arange(self.num_examples, dtype=np.uint32)
        high, low = threefry2x32(name_key(self._seed, "order", str(epoch)), index, np.zeros_like(index))
        return np.lexsort((index, low, high))

    def _fill(self, numbers: list[int] | list[int | None]) -> Batch:
        """The examples of these numbers as a batch; None is an example of padding."""
        shape = (len(numbers), self._data.sequence_tokens)
        input_ids = np.full(shape, self._pad, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, number in enumerate(numbers):
            parts = [] if number is None else [self._segments[j] for j in self._example_segments[number]]
            used = sum(segment.length for segment in parts)
            at = shape[1] - used if self._data.padding_side == "left" else 0
            for ordinal, segment in enumerate(parts, 1):
                to = at + segment.length
                if segment.begin is not None:
                    input_ids[i, at] = self._store.tokens[segment.begin]
                real = slice(to - (segment.stop - segment.start), to)
                input_ids[i, real] = self._store.tokens[segment.start : segment.stop]
                targets = _targets(self._store, self._data, segment)
                labels[i, real] = np.where(targets, input_ids[i, real], IGNORED)
                positions[i, at:to] = np.arange(to - at)
                segments[i, at:to] = ordinal
                at = to
        return Batch(input_ids, labels, positions, segments, np.arange(len(numbers), dtype=np.int32))

    def _warnings(self, found: _Segments, vocab: int) -> Iterator[str]:
        """What a user should know about the data, one line each."""
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


def check_data(run: Run, *splits: Split) -> None:
    """Raises DataError where these splits of a run's data cannot be there, without reading them."""
    recipe, data = run.recipe, run.recipe.data
    check_positions(recipe, run.spec)
    tokenizer = find_tokenizer(data, run.directory, recipe.model.from_)
    for split in splits:
        check_tokens(_source(data, split), tokenizer, data)


def open_dataset(run: Run, split: Split) -> Dataset:
    """One split of the run's data. Raises DataError where a record is malformed or none is usable."""
    recipe, model, data = run.recipe, run.spec, run.recipe.data
    source = _source(data, split)
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
    """Raises DataError where an example with its virtual tokens has more positions than the model."""
    virtual = position_shift(recipe.method)
    if recipe.data.sequence_tokens + virtual > model.max_positions:
        beside = f" and method.virtual_tokens={virtual}" if virtual else ""
        raise DataError(
            f"data.sequence_tokens={recipe.data.sequence_tokens}{beside}: {model.name} has {model.max_positions} positions"
        )


def _source(data: Data, split: Split) -> str:
    source = data.train if split == "train" else data.heldout
    if source is None:
        raise DataError("data.heldout: not given; it names the records to measure on")
    return source


def _targets(store: TokenStore, data: Data, segment: Segment) -> NDArray[np.bool_]:
    """Which tokens of a segment are targets, without its copied begin token. One that nothing precedes never is."""
    if data.loss_on == "all":
        targets = np.ones(segment.stop - segment.start, np.bool_)
    else:
        targets = (np.asarray(store.marks[segment.start : segment.stop]) & COUNTS) > 0
    if segment.begin is None:
        targets[:1] = False
    return targets


def _segments(store: TokenStore, data: Data) -> _Segments:
    """Whole records, and of those that do not fit, what `data.too_long` keeps."""
    found, limit = _Segments(), data.sequence_tokens
    bos = store.special("bos")
    for start, stop in pairwise(store.offsets.tolist()):
        segments = [Segment(start, stop)]
        if stop - start > limit:
            found.too_long += 1
            match data.too_long:
                case "skip":
                    found.lost_tokens += stop - start
                    continue
                case "cut":
                    found.lost_tokens += stop - start - limit
                    segments = [Segment(start, start + limit)]
                case "split":
                    segments = list(_split(store, start, stop, limit, begins=store.tokens[start] == bos))
        kept = [segment for segment in segments if _targets(store, data, segment).any()]
        found.without_target += len(segments) - len(kept)
        found.usable += kept
    return found


def _split(store: TokenStore, start: int, stop: int, limit: int, *, begins: bool) -> Iterator[Segment]:
    """Segments that fill an example or end with a turn; all but the first start with a copy of the begin token."""
    at = start
    while at < stop:
        # An example of one token has no room for a begin token before another.
        begin = start if begins and at > start and limit > 1 else None
        room = limit - (begin is not None)
        to = min(at + room, stop)
        if to < stop:
            turns = np.flatnonzero(np.asarray(store.marks[at + 1 : to + 1]) & TURN)
            to = at + 1 + int(turns[-1]) if len(turns) else to
        yield Segment(at, to, begin)
        at = to


def _summary(store: TokenStore, found: _Segments, data: Data, examples: int, where: str) -> str:
    """What the file holds and what becomes of it, in one line."""
    about = store.about
    filled = sum(segment.length for segment in found.usable)
    share = 100 * filled / max(1, examples * data.sequence_tokens)
    targets = sum(int(_targets(store, data, segment).sum()) for segment in found.usable)
    does = {"skip": "skipped", "cut": "cut", "split": "split"}[data.too_long]
    skipped = {"without a target": found.without_target, **about["skipped"]}
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    return (
        f"{where}: {about['records']} records make {len(found.usable)} segments in {examples} examples of {data.sequence_tokens} "
        f"tokens, {share:.0f} % filled, {targets} targets; {found.too_long} too long ({does}); "
        f"skipped: {left_out or 'none'}"
    )


def _pack(lengths: NDArray[np.int64], limit: int) -> list[list[int]]:
    """Which segments each example holds: best fit decreasing, each goes where it leaves the least room."""
    examples: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, example), sorted
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            examples.append([])
            free, example = limit, len(examples) - 1
        else:
            free, example = room.pop(at)
        examples[example].append(segment)
        bisect.insort(room, (free - length, example))
    return examples
