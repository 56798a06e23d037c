"""What a check or a comparison of responses is doing, on stderr: one line that is rewritten on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from parity.comparison.pair import NAMES
from parity.runs.answers import Answers
from parity.runs.programs import Watcher
from parity.runs.work import REFERENCE, Work, in_words

# A line of a training, and of the reference: both are printed once a pass is made.
_UPDATE = re.compile(r"step +(\d+)  loss ")
_REPEATED = re.compile(r"reference of (left|right): step (\d+)(?:, draw (\d+))?$")
# Lines of a side that generates, and of its reference, after a batch of prompts; and of a side at its end.
_ANSWERED = re.compile(
    r"(?:reference: )?(\d+) of \d+ responses$|wrote .*: (\d+) responses?, \d+ ended by themselves$"
)
# In the order in which they are shown.
PROGRAMS = (*NAMES, REFERENCE)
# Elsewhere than on a terminal: seconds from one line to the next.
SPARSE_SECONDS = 15.0
# There, nothing is written before the first update is made, or this has gone by: a mistake of the user mostly shows
# before, and is one line.
QUIET_SECONDS = 60.0
# A line on a terminal is rewritten, which works only while it is shorter than the terminal is wide.
WIDTH = 118


@dataclass
class _Part:
    """A program that runs, or has run: `passes` of `total` are made, the last after `last` seconds.

    The first that were told together are `first_passes`, after `first` seconds.
    """

    total: int
    began: float
    passes: int = 0
    first_passes: int = 0
    first: float = 0.0
    last: float = 0.0
    at: str = "starting"
    has_ended: bool = False

    def made(self, now: float, at: str, *, passes: int | None = None) -> None:
        """Note that one more pass is made, or that `passes` are by now."""
        self.passes = self.passes + 1 if passes is None else passes
        self.last, self.at = now - self.began, at
        if not self.first:
            self.first, self.first_passes = self.last, self.passes

    def seconds_left(self) -> float | None:
        """At the speed since the first pass, which holds the compilation; None before the second."""
        if self.has_ended:
            return 0.0
        if self.passes == self.first_passes:
            return None
        each = (self.last - self.first) / (self.passes - self.first_passes)
        return max(0, self.total - self.passes) * each


@dataclass
class Progress(Watcher):
    """Shows on `stream` what will run and how far it is. `watched`: the stream is a terminal."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    watched: bool | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._is_terminal = self.stream.isatty() if self.watched is None else self.watched
        self._began, self._said, self._shown = self.clock(), -SPARSE_SECONDS, ""
        self._work: Work | Answers | None = None
        self._parts: dict[str, _Part] = {}
        self._held: list[str] = []
        self._is_quiet = not self._is_terminal

    def planned(self, work: Work | Answers) -> None:
        """Says what will run, how long it may take, and what would make it cheaper."""
        with self._lock:
            self._work, self._parts = work, {}
            self._held += work.announcement()
            self._flush()

    def started(self, program: str, process: int) -> None:
        """Shows the program as starting."""
        with self._lock:
            total = self._work.passes(program) if self._work else 0
            # The second part of a resumed side goes on counting.
            part = self._parts.setdefault(program, _Part(total, self.clock()))
            part.has_ended = False
            self._show("starts")

    def said(self, program: str, line: str) -> None:
        """Counts an update of a side, a pass of the reference, or responses."""
        with self._lock:
            part = self._parts.get(program)
            if part is None:
                return
            if update := _UPDATE.match(line):
                part.made(self.clock(), f"{update[1]}/{part.total} updates")
            elif repeated := _REPEATED.match(line):
                part.made(self.clock(), self._described(*repeated.groups()))
            elif isinstance(self._work, Answers) and (answered := _ANSWERED.match(line)):
                count = int(answered[1] or answered[2])
                at = f"{'reference ' * (program == REFERENCE)}{count}/{part.total} responses"
                part.made(self.clock(), at, passes=count)
            else:
                return
            self._is_quiet = False
            self._show("passes")

    def ended(self, program: str) -> None:
        """Shows the program as done."""
        with self._lock:
            if program in self._parts:
                self._parts[program].has_ended = True
            self._show("ends")

    def comparing(self) -> None:
        """Says that the traces are compared."""
        with self._lock:
            self._write(f"comparing {self._work.compared if self._work else 'the traces'}", is_event=True)

    def finished(self) -> None:
        """Clears the line on a terminal."""
        with self._lock:
            if self._is_terminal and self._shown:
                self.stream.write("\r\x1b[K")
                self.stream.flush()
            self._shown = ""

    def _described(self, side: str, step: str, draw: str | None) -> str:
        assert isinstance(self._work, Work)
        of = f"reference of {side}: update {step}/{self._work.steps}"
        return f"{of}, draw {draw}/{self._work.draws}" if draw else of

    def _show(self, event: str) -> None:
        order = sorted(self._parts, key=PROGRAMS.index)
        states = [self._state(name, self._parts[name]) for name in order]
        self._write(", ".join(states) + self._times(), is_event=event == "ends")

    def _state(self, name: str, part: _Part) -> str:
        if part.has_ended:
            return f"{name} done" if part.passes >= part.total else f"{name} ended"
        return part.at if name == REFERENCE and part.passes else f"{name} {part.at}"

    def _times(self) -> str:
        """How long it has taken, and at the measured speed how long what runs still takes."""
        gone = f"; {in_words(self.clock() - self._began)} so far"
        left = [part.seconds_left() for part in self._parts.values()]
        known = [seconds for seconds in left if seconds is not None]
        if len(known) < len(left) or not any(known):
            return gone
        together = self._work is not None and self._work.at_once
        seconds = max(known) if together else sum(known)
        more = "" if self._work is None or self._work.ends_with(self._parts) else " for this part"
        return f"{gone}, about {in_words(seconds)} to go{more}"

    def _write(self, text: str, *, is_event: bool) -> None:
        """Rewrite the line on a terminal; elsewhere write one where the last is old enough, or a program has ended."""
        now = self.clock()
        if self._is_terminal:
            self._flush()
            self._shown = text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
            self.stream.write(f"\r\x1b[K{self._shown}")
            self.stream.flush()
            return
        if self._is_quiet and now - self._began < QUIET_SECONDS:
            return
        if is_event or now - self._said >= SPARSE_SECONDS:
            self._flush()
            self._said = now
            self.stream.write(f"parity: {text}\n")
            self.stream.flush()

    def _flush(self) -> None:
        """Write the lines that are to stay."""
        if self._is_quiet and self.clock() - self._began < QUIET_SECONDS:
            return
        for line in self._held:
            self.stream.write(f"\r\x1b[K{line}\n" if self._is_terminal else f"{line}\n")
        self._held.clear()
        self.stream.flush()
