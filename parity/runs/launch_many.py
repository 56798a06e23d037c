"""Many training runs of one backend in few launches, so that imports and equal compilations are paid once.

A launch runs `parity.runs.plant`. A backend whose process holds all devices runs every case in one launch, those with
most devices first, as the first run creates the process's fake devices. A backend with a process per device needs a
launch per number of devices, for more than one by `forked`. Every case gets a result, whatever happens in
a launch: one that crashed or hung is reported as such, and the cases after it continue in a new launch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from parity.runs.devices import COMPILE_CACHE, FORCED, QUIET_THREADS
from parity.runs.edit import Edit
from parity.runs.plant import CRASHED
from trainspec.backends import BACKENDS
from trainspec.errors import EXIT_DONE
from trainspec.plans.plan import Backend

# One thread per process, as all processes share the machine's cores. For tiny models compilation is most of JAX's time, so
# it is told to optimize little, and to generate fused loops the older way, which takes a quarter of the time: the program
# is the same, fused less.
ENVIRONMENT = (
    QUIET_THREADS
    | COMPILE_CACHE
    | {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    }
)
# Seconds in which no run has ended. The longest tiny run on a busy machine takes a tenth of it; a launch that is silent
# for longer is waiting for a process that has died.
SILENCE_SECONDS = 300.0
# `forked` waits 30 seconds for its processes to end before it kills them.
ENDING_SECONDS = 45.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One command line of a backend, the edits planted in it, and the number of devices that its plan needs."""

    argv: tuple[str, ...]
    devices: int = 1
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """How a case ended: its exit code, the last line of stderr, and its stdout."""

    code: int
    said: str = ""
    printed: str = ""

    @property
    def wrong(self) -> str | None:
        """Why there is nothing to compare; None if the run succeeded."""
        return None if self.code == EXIT_DONE else self.said or f"exit code {self.code}"


def training(
    recipe: Path,
    home: Path,
    *,
    devices: int,
    edits: Sequence[Edit] = (),
    activations: bool = False,
    trace: str = "trace",
) -> Case:
    """A training of `recipe` that writes `home`/run and `home`/`trace`; an earlier `home` is removed."""
    shutil.rmtree(home, ignore_errors=True)
    argv = ["train", str(recipe), "--out", str(home / "run"), "--trace", str(home / trace)]
    argv += ["--activations", "all"] if activations else []
    return Case(tuple(argv), devices, tuple(edits))


def run_cases(backend: Backend, cases: Sequence[Case], *, home: Path, at_once: int = 1) -> list[CaseResult]:
    """Run every case to its end; the results are in the order of `cases`. Logs and the launches' files go to `home`.

    A backend whose process holds all devices shares the cases out to `at_once` launches. Those of one recipe stay together,
    as they have compiled programs in common.
    """
    if cases and at_once > 1 and not BACKENDS[backend].has_process_per_device:
        shares = _shares(cases, at_once)
        with ThreadPoolExecutor(len(shares)) as pool:
            mine = [[cases[i] for i in share] for share in shares]
            ended = pool.map(lambda n: run_cases(backend, mine[n], home=home / str(n)), range(len(shares)))
            found = {
                i: r
                for share, some in zip(shares, ended, strict=True)
                for i, r in zip(share, some, strict=True)
            }
        return [found[i] for i in range(len(cases))]
    home.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(cases)), key=lambda i: -cases[i].devices)
    results: dict[int, CaseResult] = {}
    per_device = BACKENDS[backend].has_process_per_device
    for devices, numbers in groupby(order, key=lambda i: cases[i].devices if per_device else 1):
        remaining = list(numbers)
        while remaining:
            launch = _Launch(backend, devices, home)
            ended = launch.run([cases[i] for i in remaining])
            results |= dict(zip(remaining, ended, strict=False))
            remaining = remaining[len(ended) :]
    return [results[i] for i in range(len(cases))]


def _shares(cases: Sequence[Case], count: int) -> list[list[int]]:
    """The numbers of the cases in at most `count` shares of about the same size, none of them empty."""
    by_recipe: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        by_recipe.setdefault(" ".join(case.argv[:2]), []).append(number)
    shares: list[list[int]] = [[] for _ in range(count)]
    for numbers in sorted(by_recipe.values(), key=len, reverse=True):
        min(shares, key=len).extend(numbers)
    return [share for share in shares if share]


@dataclass(frozen=True)
class _Launch:
    """One start of a backend; `processes` is 1 if one process holds all devices."""

    backend: Backend
    processes: int
    home: Path

    def run(self, cases: Sequence[Case]) -> list[CaseResult]:
        """The results of the first cases, at least one: all, or up to the one that ended the launch."""
        name = f"{self.backend}-{self.processes}"
        file, results = self.home / f"{name}-cases.json", self.home / f"{name}-results.jsonl"
        for old in self.home.glob(f"{results.name}*"):
            old.unlink()
        program = BACKENDS[self.backend].program
        written = [{"program": program, "argv": c.argv, "edits": [asdict(e) for e in c.edits]} for c in cases]
        file.write_text(json.dumps(written), encoding="utf-8")
        why = self._watch([*self._launcher(), "parity.runs.plant", str(file), str(results)], results)
        ended = _read_results(results)
        if len(ended) < len(cases) and all(result.code == EXIT_DONE for result in ended[-1:]):
            ended.append(CaseResult(CRASHED, f"{program} {why}; its log is {self._log}"))
        return ended

    @property
    def _log(self) -> Path:
        return self.home / f"{self.backend}-{self.processes}.log"

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable, "-m"]
        forked = (str(self.processes), BACKENDS[self.backend].program)
        return [sys.executable, "-m", "parity.runs.forked", *forked]

    def _watch(self, command: Sequence[str], results: Path) -> str:
        """Run `command` until it ends or hangs; returns which of the two, in words. Leaves no process behind."""
        with self._log.open("a", encoding="utf-8") as log:
            # The user's environment overrides these defaults.
            cache = {"JAX_COMPILATION_CACHE_DIR": str(self.home / "jax-cache")}
            environment = {**ENVIRONMENT, **cache, **os.environ, **FORCED["cpu"]}
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            size, since = 0, time.monotonic()
            try:
                while child.poll() is None:
                    now = results.stat().st_size if results.exists() else 0
                    if now > size:
                        size, since = now, time.monotonic()
                    if time.monotonic() - since > SILENCE_SECONDS:
                        return f"did not end within {SILENCE_SECONDS:.0f} seconds"
                    time.sleep(POLL_SECONDS)
                return f"died with exit code {child.returncode}"
            finally:
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """`forked` ends its processes on SIGTERM; a process that outlives it ends by itself (`plant`)."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            child.send_signal(signal_number)
            try:
                child.wait(timeout=ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _read_results(results: Path) -> list[CaseResult]:
    """The results of the cases in order. If a case failed in several processes, that of the first with an error message."""
    every = [record for file in results.parent.glob(f"{results.name}*") for record in _records(file)]
    ended: list[CaseResult] = []
    while mine := [record for record in every if record["case"] == len(ended)]:
        bad = [record for record in mine if record["code"] != EXIT_DONE]
        first = min(bad, key=lambda r: (not r["err"].strip(), r["at"]), default=mine[0])
        ended.append(CaseResult(first["code"], _last_line(first["err"]), first["out"]))
    return ended


def _records(file: Path) -> list[dict[str, Any]]:
    """The complete lines; the last line of a killed process may be cut short."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
