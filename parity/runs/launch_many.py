"""Many training runs of one backend with few launches: imports and equal compilations are paid once.

A launch is `parity.runs.plant`. A backend whose process has all devices takes every case in one, those with most devices
first, as the first run makes the process's fake devices. One with a process for each device takes a launch for each
number of devices: with more than one it is torch's elastic launcher. Whatever happens in a launch, every run gets an end: one that
crashed, or in which nothing more happened, is reported so, and those after it go on in a new launch.
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
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from parity.runs.edit import Edit
from parity.runs.plant import CRASHED
from parity.runs.sides import COMPILE_CACHE, CPU_ONLY, QUIET_THREADS
from trainspec.backends import BACKENDS
from trainspec.errors import EXIT_DONE
from trainspec.plans.plan import Backend

# One thread for each process: as many as there are devices share the machine's cores. Of tiny models compilation is
# most of JAX's time: take its short way. It is the same program, fused less.
ENVIRONMENT = (
    QUIET_THREADS
    | COMPILE_CACHE
    | {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
)
# Seconds without one more run having ended. The longest that a tiny run takes on a busy machine is a tenth of it: what
# is silent for so long waits for a process that is gone.
SILENCE_SECONDS = 300.0
# The elastic launcher gives its processes 30 seconds to end before it kills them.
ENDING_SECONDS = 45.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One command line of a backend, the mistakes planted in it, and how many devices its plan takes."""

    argv: tuple[str, ...]
    devices: int = 1
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """How a run ended: its exit code, the last line of its errors, and all that it printed beside them."""

    code: int
    said: str = ""
    printed: str = ""

    @property
    def wrong(self) -> str | None:
        """Why there is nothing to compare; None where the run was made."""
        return None if self.code == EXIT_DONE else self.said or f"exit code {self.code}"


def training(
    recipe: Path, home: Path, *, devices: int, edits: Sequence[Edit] = (), activations: bool = False
) -> Case:
    """A run of `recipe` that leaves `home`/run and `home`/trace; what was there is removed."""
    shutil.rmtree(home, ignore_errors=True)
    argv = ["train", str(recipe), "--out", str(home / "run"), "--trace", str(home / "trace")]
    argv += ["--activations", "all"] if activations else []
    return Case(tuple(argv), devices, tuple(edits))


def run_cases(backend: Backend, cases: Sequence[Case], *, home: Path) -> list[CaseResult]:
    """Run every case to its end, in the order of `cases`. Logs and the launches' own files go to `home`."""
    home.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(cases)), key=lambda i: -cases[i].devices)
    ended: dict[int, CaseResult] = {}
    per_device = BACKENDS[backend].has_process_per_device
    for devices, numbers in groupby(order, key=lambda i: cases[i].devices if per_device else 1):
        left = list(numbers)
        while left:
            launch = _Launch(backend, devices, home)
            found = launch.run([cases[i] for i in left])
            ended |= dict(zip(left, found, strict=False))
            left = left[len(found) :]
    return [ended[i] for i in range(len(cases))]


@dataclass(frozen=True)
class _Launch:
    """One start of a backend; `processes` is 1 where one process has all devices."""

    backend: Backend
    processes: int
    home: Path

    def run(self, cases: Sequence[Case]) -> list[CaseResult]:
        """The ends of the first cases, at least one: all, or up to the one that ended the launch."""
        name = f"{self.backend}-{self.processes}"
        file, results = self.home / f"{name}-cases.json", self.home / f"{name}-results.jsonl"
        for old in self.home.glob(f"{results.name}*"):
            old.unlink()
        program = BACKENDS[self.backend].program
        written = [{"program": program, "argv": c.argv, "edits": [asdict(e) for e in c.edits]} for c in cases]
        file.write_text(json.dumps(written), encoding="utf-8")
        why = self._watch([*self._launcher(), "-m", "parity.runs.plant", str(file), str(results)], results)
        found = _ends(results)
        if len(found) < len(cases) and all(ended.code == EXIT_DONE for ended in found[-1:]):
            found.append(CaseResult(CRASHED, f"{program} {why}; its log is {self._log}"))
        return found

    @property
    def _log(self) -> Path:
        return self.home / f"{self.backend}-{self.processes}.log"

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)]
        # Port 0: the system chooses a free one. Without a directory of its own it leaves one in /tmp.
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        return [*command, "--log-dir", str(self.home / "elastic")]

    def _watch(self, command: Sequence[str], results: Path) -> str:
        """Run `command` until it ends or nothing more happens; how it ended. Leaves no process behind."""
        with self._log.open("a", encoding="utf-8") as log:
            # What the user has set goes before what is set here.
            cache = {"JAX_COMPILATION_CACHE_DIR": str(self.home / "jax-cache")}
            environment = ENVIRONMENT | cache | os.environ | CPU_ONLY
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
    """The elastic launcher ends its processes when it is asked to; one that it leaves ends by itself (`plant`)."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            child.send_signal(signal_number)
            try:
                child.wait(timeout=ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _ends(results: Path) -> list[CaseResult]:
    """How the cases ended, one after the other; of several processes in which one ended badly the first that says why."""
    every = [record for file in results.parent.glob(f"{results.name}*") for record in _records(file)]
    found: list[CaseResult] = []
    while mine := [record for record in every if record["case"] == len(found)]:
        bad = [record for record in mine if record["code"] != EXIT_DONE]
        first = min(bad, key=lambda r: (not r["err"].strip(), r["at"]), default=mine[0])
        found.append(CaseResult(first["code"], _last_line(first["err"]), first["out"]))
    return found


def _records(file: Path) -> list[dict[str, Any]]:
    """A process that was killed may leave its last line cut short."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
