"""Starting the processes of a run, where no launcher has: one for every device of the plan, on this machine.

torchrun, DeepSpeed's launcher and Slurm say who is who in the environment; with one of them this starts nothing.
Not torch's own elastic launcher: a kill of it leaves its processes running, and a person's mistake comes out as a
page of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainspec.command import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED

_POLL_SECONDS = 0.05
# How long processes may take to end by themselves once one has, before they are ended.
_GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def describe_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's names for what Slurm says of a job step of several tasks; nothing where a launcher said it already."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"])),
        # Jobs that share a node differ in their number.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20_000 + job % 10_000)),
    }


def _first_host(nodes: str) -> str:
    """`gpu[03-05,09],login1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    assert match, nodes
    return match[1] + (match[2] or "")


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether somebody started this process as one of a group."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    return processes > 1 or "TORCHELASTIC_RUN_ID" in environment or bool(describe_cluster(environment))


def launch(program: str, argv: Sequence[str], *, processes: int) -> int:
    """Run `python -m PROGRAM ARGV` that many times, as one group; the exit code is 0 or that of the first to fail.

    All of them end with the first that fails, and with this process, however it ends.
    """
    # Held here, so that its port is one that is free.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # torch's words for "the store is there already".
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Processes share the cores: each takes one, unless a person says otherwise.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = [sys.executable, "-m", program, *argv]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = os.environ | group | place
            children.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent))
        return _wait(program, children)
    except KeyboardInterrupt:  # they had it, too: the leader says what there is to say
        _wait_for_all(children, _GRACE_SECONDS)
        return EXIT_INTERRUPTED
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(program: str, children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the group, as soon as one has failed or all are done."""
    while True:
        codes = [child.poll() for child in children]
        bad = [(rank, code) for rank, code in enumerate(codes) if code]
        if bad:
            # The others mostly fail of the same: the leader's code and word come first.
            _wait_for_all(children[:1], _GRACE_SECONDS)
            rank, code = (0, children[0].returncode) if children[0].returncode else bad[0]
            if code < 0:
                name = signal.Signals(-code).name
                print(f"{program}: process {rank} of {len(children)} was ended by {name}", file=sys.stderr)
                return EXIT_FAILED
            return code
        if None not in codes:
            return EXIT_DONE
        time.sleep(_POLL_SECONDS)


def _wait_for_all(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Return when all have ended, or after that many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_SECONDS)


# Loaded here, not between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, also where nothing else of the parent could."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
