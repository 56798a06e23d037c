"""Start the processes of a launch by forking one that has loaded the backend: what takes them longest is done once.

    python -m parity.runs.forked PROCESSES PROGRAM MODULE ARG...      as `torchrun --nproc-per-node PROCESSES -m MODULE ARG...`
    python -m parity.runs.forked PROCESSES PROGRAM SCRIPT.py ARG...

Loading torch and transformers takes a process many times as long as the run of a tiny model does. A forked process is a
process like any other: it joins its group over gloo, and shares nothing with the others but memory that neither has written.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

# Threads of a parent do not exist in its children, so it must have none that works.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# How long the others may take to end after one has failed, before they are killed.
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.05


def main() -> None:
    """Read the arguments, start the processes and be one of them, or wait for them all."""
    processes, program, module, *arguments = sys.argv[1:]
    os.environ |= {name: os.environ.get(name, value) for name, value in _ONE_THREAD.items()}
    importlib.import_module(f"{program}.step")
    gc.freeze()  # a collection in a child would write to, and so copy, what is shared
    children = _forked(int(processes))
    if children is None:
        sys.argv = [module, *arguments]
        if module.endswith(".py"):
            sys.path.insert(0, str(Path(module).parent))
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.exit(_wait(children))


def _forked(processes: int) -> list[int] | None:
    """The ids of the processes, or None in each of them, whose environment then says its rank as torchrun's would."""
    os.environ |= {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return None
        children.append(child)
    return children


def _wait(children: list[int]) -> int:
    """0 if all end well, else the exit code of the first that does not; the others are then ended."""

    def end(*_: object) -> None:
        _signal(children, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    running, code, deadline = set(children), 0, float("inf")
    while running:
        if time.monotonic() > deadline:
            _signal(running, signal.SIGKILL)
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.discard(child)
                if status and not code:
                    code, deadline = abs(os.waitstatus_to_exitcode(status)), time.monotonic() + _GRACE_SECONDS
                    _signal(running, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    return code


def _signal(children: list[int] | set[int], number: signal.Signals) -> None:
    for child in list(children):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


if __name__ == "__main__":
    main()
