"""Tokenises the records of a file into a folder, in the worker process; a large file uses all cores."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trainspec.cores import cores
from trainspec.errors import DataError
from trainspec.parent import end_with
from trainspec.text.chatglm import ChatGLMEncoder, is_chatglm
from trainspec.text.encode import Encoder
from trainspec.text.fields import BadRecord
from trainspec.text.files import Raw, is_hub, read_raw
from trainspec.text.locate import Unlocated
from trainspec.text.prompts import prompts
from trainspec.text.records import Reader, Text
from trainspec.text.store import COUNTS, TURN

_BATCH_RECORDS = 128
# A smaller file is done before more processes have started.
_LARGE_BYTES = 8 * 2**20
_SHOWN_ERRORS = 5
_SHOWN_RUNS = 60
_REPORT_SECONDS = 15.0


@dataclass
class _Tokenised:
    """The tokens of a batch of records, and counts of what was skipped, noted or bad."""

    tokens: bytes = b""
    marks: bytes = b""
    lengths: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    errors: dict[str, list[str]] = field(default_factory=dict)  # what is wrong -> where
    bad: list[str] = field(default_factory=list)
    targets: int = 0
    end_targets: int = 0
    asked: int = 0
    answered: int = 0
    largest: int = 0
    end: int = 0

    def add(self, other: _Tokenised) -> None:
        """Add the counts of another batch, not its tokens."""
        self.skipped.update(other.skipped)
        self.notes.update(other.notes)
        for error, where in other.errors.items():
            self.errors.setdefault(error, []).extend(where)
        self.bad += other.bad
        self.targets += other.targets
        self.end_targets += other.end_targets
        self.asked += other.asked
        self.answered += other.answered
        self.largest = max(self.largest, other.largest)


class _BatchEncoder:
    """Encodes batches of raw records; copied into every helper process."""

    def __init__(self, encoder: Encoder | ChatGLMEncoder, reader: Reader) -> None:
        self.encoder, self.reader = encoder, reader

    def encode(self, batch: list[Raw]) -> _Tokenised:
        """The tokens of every record; a bad one adds to `errors`."""
        done = _Tokenised(end=batch[-1].end)
        ids: list[int] = []
        marks: list[int] = []
        for raw in batch:
            try:
                self._one(raw, done, ids, marks)
            except Unlocated as reason:
                done.skipped[f"not located ({reason})"] += 1
            except BadRecord as error:
                done.bad.append(raw.where)
                done.errors.setdefault(str(error), []).append(raw.where)
        tokens, flags = np.asarray(ids, np.int32), np.asarray(marks, np.uint8)
        learnt = tokens[(flags & COUNTS) > 0]
        done.targets, done.largest = int(learnt.size), int(tokens.max(initial=0))
        done.end_targets = int(np.isin(learnt, list(self.encoder.ends)).sum())
        done.tokens, done.marks = tokens.tobytes(), flags.tobytes()
        return done

    def _one(self, raw: Raw, done: _Tokenised, ids: list[int], marks: list[int]) -> None:
        record = self.reader.read(raw.value(), self.encoder.template)
        if isinstance(record, Text) and record.is_blank:
            done.skipped["empty"] += 1
            return
        encoded = self.encoder.encode(record)
        done.notes.update(encoded.notes)
        if isinstance(record, Text) and record.turns:
            done.notes["written as `User:` and `Assistant:`, as the tokenizer has no chat template"] += 1
        flags = [COUNTS if counts else 0 for counts in encoded.counts]
        for turn in encoded.turns:
            flags[turn] |= TURN
        ids.extend(encoded.ids)
        marks.extend(flags)
        done.lengths.append(len(encoded.ids))
        done.asked += isinstance(record, Text) and record.is_asked
        done.answered += isinstance(record, Text) and record.is_answered


@lru_cache(maxsize=4)
def encoder_of(directory: str, chat_template: str | None, date: str, digest: str) -> Encoder | ChatGLMEncoder:
    """The encoder, cached by the digest of its files."""
    if is_chatglm(Path(directory)):
        return ChatGLMEncoder(Path(directory), chat_template)
    return Encoder(Path(directory), chat_template, date=datetime.date.fromisoformat(date))


def fill(job: dict[str, Any]) -> dict[str, Any]:
    """Write tokens.bin, marks.bin and offsets.npy into `job["folder"]`; returns the contents of about.json.

    Raises DataError for all bad records at once, unless `job["bad_records"]` is `skip`.
    """
    encoder = encoder_of(job["tokenizer"], job["chat_template"], job["date"], job["digest"])
    batch_encoder = _BatchEncoder(encoder, _reader(job))
    source, folder = job["source"], Path(job["folder"])
    total = _Tokenised()
    lengths = [0]
    num_records = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "marks.bin").open("wb") as marks:
        for count, done in _progress(source, _encoded(batch_encoder, source)):
            num_records += count
            tokens.write(done.tokens)
            marks.write(done.marks)
            lengths += done.lengths
            total.add(done)
    if total.bad and job["bad_records"] == "stop":
        raise DataError(_all_bad(source, total, num_records))
    if total.bad:
        total.skipped["bad"] = len(total.bad)
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    return {
        "records": num_records,
        "skipped": dict(total.skipped),
        "notes": dict(total.notes),
        "bad": [*_error_lines(total), merged_locations(total.bad)] if total.bad else [],
        "targets": total.targets,
        "end_targets": total.end_targets,
        "asked": total.asked,
        "answered": total.answered,
        "largest": total.largest,
        "special_tokens": encoder.special_tokens,
        "has_template": encoder.template() is not None,
    }


def _all_bad(source: str, total: _Tokenised, num_records: int) -> str:
    errors = f"{source} {'; '.join(_error_lines(total))}"
    if len(total.bad) == 1:
        return f"{errors}; fix it, or set data.bad_records=skip"
    return (
        f"{errors}; {len(total.bad)} bad records of {num_records}: {merged_locations(total.bad)}; fix them, or set "
        "data.bad_records=skip"
    )


def _error_lines(total: _Tokenised) -> list[str]:
    """The first few kinds of error, each with the location of its first record and a count."""
    kinds = list(total.errors.items())
    shown = [
        f"{where[0]}: {error}{f' (in {len(where)} records)' if len(where) > 1 else ''}"
        for error, where in kinds[:_SHOWN_ERRORS]
    ]
    more = len(kinds) - len(shown)
    return [*shown, f"{more} more kinds of errors"] if more else shown


def merged_locations(bad: Sequence[str]) -> str:
    """Locations such as `line 2`, `line 3`, `line 7` as `line 2-3, 7`; the first of them where there are very many."""
    word = bad[0].split()[0]
    numbers = [int(location.split()[1]) for location in bad]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:_SHOWN_RUNS])
    return f"{word} {shown}{', ...' if len(runs) > _SHOWN_RUNS else ''}"


def _encoded(encoder: _BatchEncoder, source: str) -> Iterator[tuple[int, _Tokenised]]:
    """The number of records and the tokens of each batch, in the order of the file."""
    raw = read_raw(source)
    batches = iter(lambda: list(islice(raw, _BATCH_RECORDS)), [])
    processes = cores() if _size(source) >= _LARGE_BYTES else 1
    if processes == 1:
        yield from ((len(batch), encoder.encode(batch)) for batch in batches)
        return
    global _shared
    _shared = encoder  # inherited by the forked processes
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, _start_helper, (os.getpid(),)) as pool:
        try:
            yield from _in_order(pool, batches, at_once=4 * processes)
        except BrokenProcessPool:
            raise OSError("a process that tokenises was killed; most likely it ran out of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


_shared: _BatchEncoder | None = None


def _start_helper(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker ends its helper processes
    end_with(worker)


def _encode_shared(batch: list[Raw]) -> _Tokenised:
    assert _shared is not None
    return _shared.encode(batch)


def _in_order(
    pool: Executor, batches: Iterable[list[Raw]], *, at_once: int
) -> Iterator[tuple[int, _Tokenised]]:
    """Encode batches in parallel, `at_once` at a time, so that memory does not grow with the file."""
    waiting: deque[tuple[int, Future[_Tokenised]]] = deque()
    for batch in batches:
        waiting.append((len(batch), pool.submit(_encode_shared, batch)))
        if len(waiting) >= at_once:
            count, result = waiting.popleft()
            yield count, result.result()
    for count, result in waiting:
        yield count, result.result()


def _size(source: str) -> int:
    """Bytes of the file or directory; a hub dataset counts as large."""
    if is_hub(source):
        return _LARGE_BYTES
    path = Path(source)
    return sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _progress(source: str, batches: Iterable[tuple[int, _Tokenised]]) -> Iterator[tuple[int, _Tokenised]]:
    """Show a progress bar on a terminal, else a line now and then; nothing for short work."""
    size, said = _size(source), time.monotonic()
    bar = tqdm(
        total=size, desc=f"tokenising {source}", unit="B", unit_scale=True, delay=2.0, disable=not sys.stderr.isatty()
    )  # fmt: skip
    with bar:
        for count, done in batches:
            bar.update(max(0, done.end - bar.n))
            if bar.disable and done.end and time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                print(f"tokenising {source}: {100 * done.end // size} %", file=sys.stderr, flush=True)
            yield count, done


def prompts_of(job: dict[str, Any]) -> dict[str, Any]:
    """The prompts that a job asks for, the records that are left out, and the ids that end a response."""
    encoder = encoder_of(job["tokenizer"], job["chat_template"], job["date"], job["digest"])
    stops = {*encoder.stops, *encoder.special_ids(job["stop"])}
    return prompts(job, encoder, _reader(job)) | {"stops": sorted(stops)}


def _reader(job: dict[str, Any]) -> Reader:
    prompt = None if job["prompt"] is None else tuple(job["prompt"])
    return Reader(job["task"], dict(job["columns"]), frozenset(job["ignore"]), job["system"], prompt)


def identify(source: str) -> str:
    """The fingerprint of a hub dataset, which identifies its content."""
    from trainspec.text.files import table

    dataset = table(source)
    return json.dumps([dataset._fingerprint, len(dataset), str(dataset.features)])
