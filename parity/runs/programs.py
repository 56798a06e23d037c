"""The programs that a check launches: their environment, their logs, and several of them at once.

A watcher is told what they do: `parity.runs.progress` shows it, `benchmarks/check_time.py` takes times.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from parity.runs.answers import Answers
from parity.runs.devices import environment
from parity.runs.work import Work
from trainspec.plans.names import DeviceKind

T = TypeVar("T")


class Watcher:
    """Is told what a check does, by several threads. A subclass overrides the methods that it needs; these do nothing."""

    def planned(self, work: Work | Answers) -> None:
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

    def run(
        self, program: str, command: Sequence[str], *, log: Path, device: DeviceKind = "cpu"
    ) -> tuple[int, str]:
        """The exit code of `command`, known to the watcher as `program`, and its last non-empty line.

        It has ended when this returns, so that the next program has the whole `device`.
        """
        last = ""
        with log.open("w", encoding="utf-8") as file, self._start(command, environment(device)) as child:
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
