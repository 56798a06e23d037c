"""Programs that work in turns, each in a process of its own: what a benchmark that compares them is made of.

A busy machine is busy for all of them alike: one round gives every program its turn, while the others wait without using a
core, and ratios are taken within a round. Core seconds, which other load hardly changes, stand beside those of the wall. A
program says what it did as one line of JSON, and waits for the next turn.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

LAST_LINES = 3


class TurnError(Exception):
    """A program that ended before its turn did, with the last lines that it wrote."""


@dataclass(frozen=True)
class Launch:
    """How a program is started."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Program:
    """A process that takes turns. Its first line comes after its first update, without being asked for."""

    def __init__(self, launch: Launch, *, log: Path) -> None:
        self.name, self._log = launch.name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                launch.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | launch.environment,
            )  # fmt: skip
        self._read()
        self.first_seconds = time.monotonic() - self._began

    def turn(self, updates: int) -> dict[str, Any]:
        """Let it make so many updates; what it says of them. Raises TurnError."""
        return self._ask(str(updates))

    def end(self) -> dict[str, Any]:
        """Its last words, after which it is gone. Raises TurnError."""
        words = self._ask("end")
        self._process.wait()
        return words

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading says why
            print(line, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TurnError(f"{self.name} ended with code {code}: " + " / ".join(said[-LAST_LINES:]))


class Turn(NamedTuple):
    """Of one turn, seconds per update: on the wall, and of all cores together."""

    seconds: float
    core_seconds: float


class Ratio(NamedTuple):
    """A ratio of every round: the median, the smallest and the largest."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass
class Measured:
    """One program: seconds to its first update, its turn of every round, and what it said last."""

    first_seconds: float
    rounds: list[Turn] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The median round's seconds per update."""
        return median(turn.seconds for turn in self.rounds)

    @property
    def core_seconds(self) -> float:
        """The median round's core seconds per update."""
        return median(turn.core_seconds for turn in self.rounds)

    def speed_beside(self, other: Measured) -> tuple[Ratio, Ratio]:
        """How many times as fast as the other it is: on the wall, and in core seconds."""
        pairs = list(zip(self.rounds, other.rounds, strict=True))
        wall = [theirs.seconds / ours.seconds for ours, theirs in pairs]
        core = [theirs.core_seconds / ours.core_seconds for ours, theirs in pairs]
        return Ratio(median(wall), min(wall), max(wall)), Ratio(median(core), min(core), max(core))


def measure(
    launches: Sequence[Launch], *, rounds: int, updates: int, warm_up: int, at_once: bool, logs: Path
) -> dict[str, Measured | str]:
    """Each program's figures, or why it has none, after `warm_up` updates and `rounds` turns of `updates`.

    With `at_once` all are there together and take turns; without, as where they would not fit a device, one after another.
    """
    groups = [launches] if at_once else [[launch] for launch in launches]
    found: dict[str, Measured | str] = {}
    for group in groups:
        found |= _measure(group, rounds=rounds, updates=updates, warm_up=warm_up, logs=logs)
    return found


def _measure(
    launches: Sequence[Launch], *, rounds: int, updates: int, warm_up: int, logs: Path
) -> dict[str, Measured | str]:
    programs: dict[str, Program] = {}
    found: dict[str, Measured] = {}
    failed: dict[str, str] = {}

    @contextmanager
    def noting_failure(name: str) -> Iterator[None]:
        try:
            yield
        except TurnError as error:
            failed[name] = str(error)
            found.pop(name, None)

    try:
        for launch in launches:
            with noting_failure(launch.name):
                log = logs / f"{launch.name.replace(' ', '-')}.log"
                programs[launch.name] = Program(launch, log=log)
                programs[launch.name].turn(warm_up)
                found[launch.name] = Measured(programs[launch.name].first_seconds)
        for number in range(rounds):
            for name in list(found) if number % 2 == 0 else list(found)[::-1]:
                with noting_failure(name):
                    took = programs[name].turn(updates)
                    found[name].rounds.append(Turn(took["seconds"] / updates, took["core_seconds"] / updates))
        for name in list(found):
            with noting_failure(name):
                found[name].last = programs[name].end()
    finally:
        for program in programs.values():
            program.kill()
    return {**found, **failed}


def machine() -> str:
    """The machine and what runs on it besides, in a line."""
    cores, busy = os.cpu_count() or 1, os.getloadavg()[0]
    return f"{cores} cores ({_processor()}), load {busy:.1f} at the start; Python {platform.python_version()}"


def _processor() -> str:
    """The processor's name and the vector instructions that decide how fast bfloat16 is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = facts.get("flags", "").split()
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    return " ".join(filter(None, (facts.get("model name", platform.machine()), best)))


def command_line() -> str:
    """This program as it was called."""
    return " ".join(["python", *sys.argv])
