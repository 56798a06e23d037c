"""trainspec data: records and examples as the model gets them, ids and vocabulary pieces, target tokens set apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray

from trainspec.data import IGNORED, Batch, Dataset, Ints

GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
WIDTH = 110


def preview(dataset: Dataset, batch: Batch) -> None:
    """Print the summary, the prompt of instruction records, the first and the last record of the file, and the examples of a batch."""
    print(dataset.summary)
    if dataset.prompt is not None:
        print("an instruction record is asked as")
        for line in dataset.prompt:
            print(f"    {line}")
    documents: list[tuple[str, Ints, NDArray[np.bool_]]] = []
    ends = [("first", 0), ("last", dataset.records - 1)]
    for name, number in ends if dataset.records > 1 else ends[:1]:
        ids, targets = dataset.record(number)
        documents.append((f"{name} usable record of the file: {_count(ids, targets)}", ids, targets))
    for i in range(len(batch.input_ids)):
        segments, example_targets = batch.segments[i], batch.labels[i] != IGNORED
        heading = (
            f"example {i}: {segments.size} tokens, {int((segments == 0).sum())} of padding, {segments.max()} document(s), "
            f"loss on {int(example_targets.sum())}"
        )
        for number in range(1, int(segments.max()) + 1):
            at = segments == number
            ids, targets = batch.input_ids[i, at], example_targets[at]
            title = f"{heading}\n" if number == 1 else ""
            documents.append((f"{title}  document {number}: {_count(ids, targets)}", ids, targets))
    _show(dataset, documents)


def _count(ids: Ints, targets: NDArray[np.bool_]) -> str:
    return f"{len(ids)} tokens, loss on {int(targets.sum())}"


def _show(dataset: Dataset, documents: list[tuple[str, Ints, NDArray[np.bool_]]]) -> None:
    stretches = [list(_stretches(ids, targets)) for _, ids, targets in documents]
    words = iter(dataset.pieces([ids for parts in stretches for _, ids in parts]))
    for (title, _, _), parts in zip(documents, stretches, strict=True):
        print(title)
        for counts, ids in parts:
            pieces, text = next(words)
            _show_stretch(counts, text, ids, pieces)


def _show_stretch(counts: bool, text: str, ids: Ints, pieces: list[str]) -> None:
    mark, shade = ("target", GREEN) if counts else ("masked", DIM)
    print(f"    {mark} {shade}{text!r}{PLAIN}" if sys.stdout.isatty() else f"    {mark} {text!r}")
    line = " ".join(f"{i}:{piece!r}" for i, piece in zip(ids.tolist(), pieces, strict=True))
    for part in wrap(line, WIDTH - 11, break_long_words=False, break_on_hyphens=False):
        print(f"           {part}")


def _stretches(ids: Ints, targets: NDArray[np.bool_]) -> Iterator[tuple[bool, Ints]]:
    """Runs of consecutive tokens that all are, or all are not, targets."""
    starts = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
    for start, stop in pairwise(starts):
        if start < stop:
            yield bool(targets[start]), ids[start:stop]
