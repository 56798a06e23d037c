"""Where the time of a run goes: from the command to the first update, and in each update. `--timings` prints it.

One clock per run. Its laps follow on each other without a gap, and so do the spans of an update, but for what the loop
itself does between them: what is listed adds up to what was waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
# The spans of an update that are not an observer's: until the batch is there, until all processes have agreed to go on, the
# update, and reading weights for observers.
INPUT, AGREE, UPDATE, READ = "input", "agreement", "update", "weights read"
FIRST = "first update"
# Set by a process that launches others for the same command.
BEGAN = "TWINTRAIN_BEGAN"


@dataclass(frozen=True)
class Lap:
    """What was done, for how long, and how much of that was a kind of work that a backend told of (compiling)."""

    name: str
    seconds: float
    of_which: Mapping[str, float] = field(default_factory=dict)


class Clock:
    """The time of one run in this process; `began` is a reading of `time.perf_counter`."""

    def __init__(self, began: float | None = None) -> None:
        self._began = self._last = time.perf_counter() if began is None else began
        self._intervals: dict[str, list[tuple[float, float]]] = {}
        self._update: dict[str, float] = {}
        self.laps: list[Lap] = []
        self.updates: list[dict[str, float]] = []
        self.counts: dict[str, int] = {}

    def lap(self, name: str) -> None:
        """All since the last lap was `name`."""
        now = time.perf_counter()
        of_which = {kind: _covered(intervals) for kind, intervals in self._intervals.items()}
        self.laps.append(Lap(name, now - self._last, of_which))
        self._last, self._intervals = now, {}

    def tell(self, kind: str, start: float, end: float) -> None:
        """Some kind of work took from `start` to `end`, on any clock. What overlaps counts once."""
        self._intervals.setdefault(kind, []).append((start, end))

    def count(self, name: str) -> None:
        """Something happened once more."""
        self.counts[name] = self.counts.get(name, 0) + 1

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What is done inside belongs to this update as `name`, after an error too."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._update[name] = self._update.get(name, 0.0) + time.perf_counter() - began

    def awaited(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, each with the begin of an update; how long it was waited for is its `INPUT`."""
        rest = iter(batches)
        while True:
            self._update = {}
            try:
                with self.during(INPUT):
                    batch = next(rest)
            except StopIteration:
                return
            yield batch
            self.updates.append(self._update)
            if len(self.updates) == 1:
                self.lap(FIRST)
                first = self.laps[-1]  # what its observers took is no part of a later update either
                observed = {k: s for k, s in self._update.items() if k not in (INPUT, AGREE, UPDATE, READ)}
                self.laps[-1] = replace(first, of_which={**first.of_which, **observed})

    def seconds(self, name: str) -> float:
        """How long the current update's span `name` was."""
        return self._update.get(name, 0.0)

    @property
    def is_first(self) -> bool:
        """Whether the current update is the process's first, in which programs are compiled and memory is taken."""
        return not self.updates

    def report(self) -> dict[str, Any]:
        """All of it, for JSON. The first update is a lap and in no other figure."""
        later = self.updates[1:]
        names = list(dict.fromkeys(name for update in later for name in update))
        spans = {name: [update.get(name, 0.0) for update in later] for name in names}
        return {
            "laps": [
                {"what": lap.name, "seconds": lap.seconds} | ({"of_which": dict(lap.of_which)} if lap.of_which else {})
                for lap in self.laps
            ],
            "to_first_update_seconds": sum(lap.seconds for lap in self.laps),
            "later_updates": len(later),
            "later_seconds": time.perf_counter() - self._last,
            "per_update": {
                name: {
                    "total": sum(all_of_them),
                    "median": median(all_of_them),
                    "largest": max(all_of_them),
                }
                for name, all_of_them in spans.items()
            },
            "counts": self.counts,
        }  # fmt: skip


def table(report: Mapping[str, Any]) -> list[str]:
    """`Clock.report` as lines."""
    lines = [f"{'to the end of the first update':32} {report['to_first_update_seconds']:9.2f} s"]
    for lap in report["laps"]:
        parts = [f"{kind} {seconds:.2f}" for kind, seconds in lap.get("of_which", {}).items()]
        of_which = f"   of which {', '.join(parts)}" if parts else ""
        lines.append(f"  {lap['what']:30} {lap['seconds']:9.2f} s{of_which}")
    if report["counts"]:
        lines.append("  " + ", ".join(f"{name}: {count}" for name, count in report["counts"].items()))
    if report["later_updates"]:
        lines.append(
            f"{'later updates: ' + str(report['later_updates']):32} {report['later_seconds']:9.2f} s"
            f"   {'of an update: median':>20} {'largest':>12}"
        )
        for name, span in report["per_update"].items():
            of_one = (f"{1000 * span[which]:9.2f} ms" for which in ("median", "largest"))
            lines.append(f"  {name:30} {span['total']:9.2f} s   {'{:>20} {:>12}'.format(*of_one)}")
    return lines


def command_start() -> float:
    """When the command began, as a reading of `time.perf_counter`: this process, or the one that launched it and set `BEGAN`.

    That clock is the machine's. Where the system does not say when a process began, it is now.
    """
    now, stat = time.perf_counter(), Path("/proc/self/stat")
    if BEGAN in os.environ:
        return float(os.environ[BEGAN])
    if not stat.is_file():
        return now
    # The 22nd field (proc(5)), in ticks since boot. The second one, in parentheses, may hold blanks.
    began_ticks = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - began_ticks / os.sysconf("SC_CLK_TCK")
    return now - age


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
