"""The programs that a check launches: their environment, their logs, and several of them at once.

A watcher is told what they do: `parity.runs.progress` shows it, `benchmarks/check_time.py` takes times.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from parity.runs.work import Work

T = TypeVar("T")
# The proof is about arithmetic, not devices: both sides run on the CPU, whatever this machine has.
CPU_ONLY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# A check runs the same programs again, for its reference or a failing step, so slow compilations are cached.
COMPILE_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("build/jax-cache").absolute()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
# Threads that spin while waiting take the cores from working ones: up to five times the wall time in torch.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


class Watcher:
    """Is told what a check does, by several threads. A subclass overrides the methods that it needs; these do nothing."""

    def planned(self, work: Work) -> None:
        """Called before anything runs, and again before a step is looked at closer."""

    def started(self, program: str, process: int) -> None:
        """Called when a program has started: `left`, `right` or `reference`, and the number of its process."""

    def said(self, program: str, line: str) -> None:
        """Called for every line that a program prints."""

    def ended(self, program: str) -> None:
        """Called when a program has ended."""

    def comparing(self) -> None:
        """Called when the programs are done, and their traces are compared."""

    def finished(self) -> None:
        """Called when the check has ended, after an error too."""


class Launcher:
    """Runs programs to their end, all output in a log, and tells `watcher`."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.watcher = watcher or Watcher()
        self._children: set[subprocess.Popen[str]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, program: str, command: Sequence[str], *, log: Path) -> tuple[int, str]:
        """The exit code of `command`, known to the watcher as `program`, and its last non-empty line."""
        last, environment = "", QUIET_THREADS | COMPILE_CACHE | os.environ | CPU_ONLY
        with log.open("w", encoding="utf-8") as file, self._start(command, environment) as child:
            assert child.stdout is not None
            self.watcher.started(program, child.pid)
            file.write(f"$ {shlex.join(command)}\n")
            for line in child.stdout:
                file.write(line)
                last = line.strip() or last
                self.watcher.said(program, line.rstrip("\n"))
        with self._lock:
            self._children.discard(child)
        self.watcher.ended(program)
        return child.returncode, last

    def at_once(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of `tasks`, which run at the same time. If one raises, the programs of the others are ended."""
        with ThreadPoolExecutor(len(tasks)) as threads:
            futures = [threads.submit(task) for task in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [error for future in done if (error := future.exception())]
                if failed:
                    raise failed[0]
            except BaseException:
                self._stop()
                raise
            return [future.result() for future in futures]

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            )
            self._children.add(child)
            if self._stopped:
                child.terminate()
        return child

    def _stop(self) -> None:
        """End the programs that run, and those that a task is about to start."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()
