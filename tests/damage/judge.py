"""Runs damaged cases through the program in this process, and says what is wrong with how they end."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage.case import Whole, write_whole
from damage.cases import make_case
from damage.silently import taken_silently
from trainspec.cli import main
from trainspec.text import process

LONGEST_CHARACTERS = 2000
LONGEST_SECONDS = 60


@dataclass
class Ended:
    """How a command line ended; `worker` is what the process that tokenises printed."""

    code: Any
    out: str
    err: str
    worker: str
    seconds: float

    @property
    def stops(self) -> str:
        return {0: "accepted", 2: "refused", 3: "machine failed"}.get(self.code, f"ended with {self.code}")


@dataclass
class Tally:
    """Of some cases of a kind: how many ended how, which of them wrongly, and the lines that were said."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0


class Program:
    """`trainspec` in this process. While it is open, what its worker process prints goes to a file that `run` reads.

    It runs in a directory of its own, where caches are, those too whose name is damaged.
    """

    def __enter__(self) -> Program:
        self.home = Path(tempfile.mkdtemp()) / "a/b/c"
        self.home.mkdir(parents=True)
        self._log = tempfile.TemporaryFile()
        process._offline.close()  # one that another test has started prints elsewhere
        self._handler = signal.signal(signal.SIGALRM, _too_long)
        return self

    def __exit__(self, *_: object) -> None:
        process._offline.close()
        signal.signal(signal.SIGALRM, self._handler)
        self._log.close()
        shutil.rmtree(self.home.parents[2])

    def run(self, argv: list[str]) -> Ended:
        """How a command line ends. A worker that it starts has the file as its error output."""
        out, err = (
            io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
            for errors in ("strict", "backslashreplace")
        )
        printed, start, stderr = self._log.seek(0, os.SEEK_END), time.monotonic(), os.dup(2)
        os.dup2(self._log.fileno(), 2)
        signal.alarm(LONGEST_SECONDS)
        try:
            with (
                contextlib.chdir(self.home),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code: Any = _code(argv)
        finally:
            signal.alarm(0)
            os.dup2(stderr, 2)
            os.close(stderr)
        seconds = time.monotonic() - start
        self._log.seek(printed)
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        return Ended(code, *texts, self._log.read().decode(errors="replace"), seconds)


def _code(argv: list[str]) -> Any:
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code
    except BaseException as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


class _TooLongError(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLongError


def try_cases(kind: str, numbers: Iterable[int], program: Program, whole: Whole, folder: Path) -> Tally:
    tally = Tally()
    for number in numbers:
        # A folder of its own: the worker keeps a tokenizer that it has read, by its path.
        place = folder / f"{kind}-{number}"
        case = make_case(kind, number, place, whole)
        ended = program.run(case.argv)
        tally.ended[ended.stops] += 1
        tally.seconds += ended.seconds
        tally.lines.append((number, ended.err.strip()))
        with contextlib.chdir(program.home):
            found = [*complaints(ended), *taken_silently(case, ended.code, ended.out)]
        tally.wrong += [f"{kind} {number}: {complaint}" for complaint in found]
        if not found:
            shutil.rmtree(place)
    return tally


def complaints(ended: Ended) -> Iterator[str]:
    """What no command may end with, whatever its input."""
    if ended.code not in (0, 2):  # no machine fails at these inputs
        yield f"exit code {ended.code}: {ended.err[-1500:]} {ended.worker[-1500:]}"
    if ended.seconds > LONGEST_SECONDS / 2:
        yield f"took {ended.seconds:.0f} s"
    lines = ended.err.splitlines()
    if len(lines) != (0 if ended.code == 0 else 1):
        yield f"{len(lines)} lines: {ended.err[:1500]}"
    if lines and not lines[0].startswith("trainspec: "):
        yield f"not the program's line: {lines[0][:500]}"
    if len(ended.err) > LONGEST_CHARACTERS:
        yield f"{len(ended.err)} characters: {ended.err[:300]} ... {ended.err[-200:]}"
    if ended.worker:
        yield f"the worker printed: {ended.worker[:1500]}"
    if "Traceback" in ended.err + ended.worker:
        yield "a traceback"
    if "or its template failed" in ended.err:
        yield f"no reason: {ended.err[:500]}"


def main_(argv: list[str]) -> None:
    """KIND FIRST LAST: try these, and print how they end."""
    kind, first, last = argv[0], int(argv[1]), int(argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = scratch + "/hf"
        whole = write_whole(Path(scratch))
        with Program() as program:
            tally = try_cases(kind, range(first, last), program, whole, Path(scratch) / "cases")
    for number, line in tally.lines:
        print(f"{kind} {number}: {line[:400]}")
    for complaint in tally.wrong:
        print("WRONG", complaint)
    print(kind, dict(tally.ended), f"{tally.seconds:.1f} s", f"{len(tally.wrong)} wrong")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main_(sys.argv[1:])
