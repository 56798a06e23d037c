"""Starting the processes of a run, where no launcher has: one for every device of the plan, on this machine.

With torchrun, DeepSpeed's launcher or Slurm nothing is started here. torch's own elastic launcher is not used: a kill of
it leaves its processes running, and it prints a page about a user's mistake. This process does not load torch: the others
would wait for it.

Of several processes the first to fail is the cause; the others fail because it is gone. So none prints why it failed:
each sends its line to this process through a pipe, and writes its stack and its libraries' messages to a log.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from torchtrain.processes import STORE
from trainspec.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, MachineError, ProcessError
from trainspec.parent import end_with
from trainspec.runs.clock import BEGAN, command_start
from trainspec.runs.stops import StopRequest, listening

_POLL_SECONDS = 0.05
# How long processes may take to end by themselves once one has, before they are ended.
_GRACE_SECONDS = 5.0
# How long processes that were asked to stop may take for their update and for saving, before they are ended: as long as a
# checkpoint waits for the files of all. A second Ctrl-C ends them at once.
_STOP_SECONDS = 1800.0
# How long it may take until a killed process is known as ended, after the others have seen its connections close.
_SETTLE_SECONDS = 0.5
# How long a process that hangs may take to write its stack.
_STACK_SECONDS = 0.5
# File descriptors of a process that `launch` started: the pipe for its line and, in the leader, the console. The leader
# has a third, the socket of `processes.STORE`.
_REPORTS, _CONSOLE = "TWINTRAIN_REPORTS_FD", "TWINTRAIN_CONSOLE_FD"
# Writes of several processes to a pipe do not mix up to 4096 bytes (POSIX asks for 512).
_LONGEST_BYTES = 3900


class _Failure(NamedTuple):
    """Which process failed, and why; `code` is its exit code, None if it ended without a line."""

    rank: int
    code: int | None
    line: str


def launch(
    program: str, argv: Sequence[str], *, processes: int, logs: Path, stop: StopRequest | None = None
) -> None:
    """Run `python -m PROGRAM ARGV` that many times, as one group.

    All of them end with the first that fails, within some seconds, and with this process, however it ends. Their output goes
    to the directory `logs`, except for what the leader's Python prints. SIGTERM and Ctrl-C are handed to them: they
    save what they have done, and are waited for. A second Ctrl-C ends them at once.

    Raises ProcessError with the line of the first that failed, or of the leader where they were asked to stop, MachineError
    if the first that failed ended without a line, and KeyboardInterrupt after all have ended of it.
    """
    # On a port that the system chooses; whoever comes before the leader has opened its store waits in the socket's queue.
    store = socket.create_server(("127.0.0.1", 0), backlog=max(128, processes))
    group = _group(processes, port=store.getsockname()[1])
    command = [sys.executable, "-m", program, *argv]
    children: list[subprocess.Popen[bytes]] = []
    with _pipe() as (reports, end), _logs(logs, processes) as files, listening(stop) as stop:
        stop.defer()
        try:
            with store:
                for rank, log in enumerate(files):
                    member = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    meeting = store.fileno() if rank == 0 else None
                    children.append(_start(command, member, log, reports=end, store=meeting))
            first, told = _first_failure(children, reports, stop)
            if first is None:
                return
            if first.code in (EXIT_STOPPED, EXIT_INTERRUPTED):
                _wait_for_all(children, _GRACE_SECONDS)
            else:  # the others fail or hang on its connections: either way their stacks are of interest
                told = _wait_for_lines(children, told, reports)
        except KeyboardInterrupt:
            _signal(children, signal.SIGINT)
            _wait_for_all(children, _GRACE_SECONDS)
            raise
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
    if first.code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if first.code == EXIT_STOPPED:
        raise ProcessError(first.line, first.code)
    who, stacks = f"process {first.rank} of {processes}", f"the stacks of all are in {logs}"
    if first.code is None:
        raise MachineError(f"{who} {first.line}; {stacks}")
    # A line that every process sends is about none of them.
    is_common = len(told) == processes and len({failure.line for failure in told}) == 1
    raise ProcessError(first.line if is_common else f"{who} ({stacks}): {first.line}", first.code)


def report_to_launcher() -> Callable[[int, str], None] | None:
    """A function by which a process that `launch` started tells its exit code and line; None in any other process.

    From here on the leader's console shows only what Python writes to stderr, not what C++ libraries write.
    """
    if _REPORTS not in os.environ:
        return None
    log, rank = sys.stderr, int(os.environ["RANK"])
    # Neither of the two is inherited by what this process starts.
    reports = int(os.environ.pop(_REPORTS))
    os.set_inheritable(reports, False)
    if _CONSOLE in os.environ:
        console = int(os.environ.pop(_CONSOLE))
        os.set_inheritable(console, False)
        sys.stderr = os.fdopen(console, "w", buffering=1, errors="backslashreplace")
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)

    def tell(code: int, line: str) -> None:
        if code != EXIT_STOPPED:
            traceback.print_exc(file=log)
            log.flush()
        if len(line.encode()) > _LONGEST_BYTES:  # a character is at most four
            line = f"{line[: _LONGEST_BYTES // 10]} ... {line[-_LONGEST_BYTES // 10 :]}"
        os.write(reports, f"{json.dumps([rank, code, line], ensure_ascii=False)}\n".encode())

    return tell


def _group(processes: int, *, port: int) -> dict[str, str]:
    """What the environments of all processes have in common."""
    return {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torch's words for "do not open a store": the leader does it before it joins.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        BEGAN: repr(command_start()),
        # Processes share the cores: each takes one, unless a user says otherwise.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _start(
    command: Sequence[str], member: Mapping[str, str], log: IO[bytes], *, reports: int, store: int | None
) -> subprocess.Popen[bytes]:
    """Start one process; the leader is the one that has the socket of the `store`."""
    descriptors = {_REPORTS: reports}
    if store is not None:
        descriptors |= {_CONSOLE: os.dup(2), STORE: store}
    try:
        return subprocess.Popen(
            command,
            env=os.environ | member | {name: str(number) for name, number in descriptors.items()},
            stdout=log if store is None else None,
            stderr=log,
            pass_fds=list(descriptors.values()),
            process_group=0,  # a terminal's Ctrl-C reaches this process alone, which hands it on once
            preexec_fn=partial(end_with, os.getpid()),
        )
    finally:
        if store is not None:
            os.close(descriptors[_CONSOLE])


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe, of which reading does not block."""
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    try:
        yield reads, writes
    finally:
        os.close(reads)
        os.close(writes)


@contextmanager
def _logs(directory: Path, processes: int) -> Iterator[list[IO[bytes]]]:
    """A file for each process. Empty ones are removed at the end, and so are directories that were made and stay empty."""
    made = [path for path in (directory, directory.parent) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [directory / f"process-{rank}.txt" for rank in range(processes)]
        try:
            yield [stack.enter_context(file.open("wb")) for file in files]
        finally:
            for file in files:
                if not file.stat().st_size:
                    file.unlink()
            for path in made:
                with suppress(OSError):  # it holds something
                    path.rmdir()


def _first_failure(
    children: Sequence[subprocess.Popen[bytes]], reports: int, stop: StopRequest
) -> tuple[_Failure | None, list[_Failure]]:
    """Wait for the first process that fails, or for all to end well; also returns all lines told by then.

    A request to stop is handed to all of them. If they stop for it, as saved, the first to "fail" is the leader.
    A process that ended without a line comes before those that tell of a broken connection, unless SIGABRT ended it:
    with that NCCL ends a process whose peer is gone.
    """
    told: list[_Failure] = []
    codes: list[int | None] = [None]
    deadline: float | None = None
    while not _has_failed(told, codes):
        if None not in codes:
            return min(told, default=None), told
        if stop.signal is not None and deadline is None:
            _signal(children, stop.signal)
            deadline = time.monotonic() + _STOP_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            why = f"has not stopped in {_STOP_SECONDS:.0f} s after {stop.asked}"
            return _Failure(codes.index(None), None, why), told
        time.sleep(_POLL_SECONDS)
        codes = [child.poll() for child in children]
        told += _received(reports)  # after it: one that has ended has told all it had to
    # The kernel closes the connections of a process before it reports its end.
    time.sleep(_SETTLE_SECONDS)
    codes = [child.poll() for child in children]
    told += _received(reports)
    spoke = {failure.rank for failure in told}
    silent = [rank for rank, code in enumerate(codes) if code and rank not in spoke]
    if stop.signal is not None and (asked := [rank for rank in silent if codes[rank] == -stop.signal]):
        # It was still loading what a run needs. The others miss it.
        return _Failure(asked[0], EXIT_STOPPED, f"stopped by {stop.asked}"), told
    causes = [rank for rank in silent if codes[rank] != -signal.SIGABRT]
    if told and not causes:
        return told[0], told
    rank = (causes or silent)[0]
    return _Failure(rank, None, _how_it_ended(codes[rank] or 0)), told


def _has_failed(told: Sequence[_Failure], codes: Sequence[int | None]) -> bool:
    """Whether one has ended, or says that it will, of something else than a request to stop."""
    well = (None, EXIT_DONE, EXIT_STOPPED)
    return any(failure.code != EXIT_STOPPED for failure in told) or any(code not in well for code in codes)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and did not say why"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as the kernel does where memory is full" if name == "SIGKILL" else "")


def _received(reports: int) -> list[_Failure]:
    """The lines that were told since the last call."""
    try:
        lines = os.read(reports, 2**20).splitlines()
    except BlockingIOError:
        return []
    return [_Failure(*json.loads(line)) for line in lines]


def _wait_for_lines(
    children: Sequence[subprocess.Popen[bytes]], told: list[_Failure], reports: int
) -> list[_Failure]:
    """Wait until every process has ended or told its line; those that do neither hang, and write their stacks."""
    deadline, silent = time.monotonic() + _GRACE_SECONDS, list(children)
    while silent and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        told = [*told, *_received(reports)]
        ranks = {failure.rank for failure in told}
        silent = [child for rank, child in enumerate(children) if rank not in ranks and child.poll() is None]
    _signal(silent, signal.SIGUSR1)
    _wait_for_all(silent, _STACK_SECONDS)
    return told


def _signal(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send a signal to those that still run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait_for_all(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Return when all have ended, or after that many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_SECONDS)
