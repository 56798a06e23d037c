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
from functools import partial

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainspec.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, PlanError

_POLL_SECONDS = 0.05
# How long processes may take to end by themselves once one has, before they are ended.
_GRACE_SECONDS = 5.0
# A Ctrl-C reaches all of them, a `kill -INT` this process alone: who is still there so much later has not had it.
_INTERRUPT_SECONDS = 1.0
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


def count_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher has started; 1 where there was none.

    Raises PlanError for what no launcher says, such as a WORLD_SIZE that was left over from another run.
    """
    group = {**environment, **describe_cluster(environment)}
    found = {name: group[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in group}
    processes, rank = found.get("WORLD_SIZE", "1"), found.get("RANK", "0")
    said = " ".join(f"{name}={value}" for name, value in found.items())
    way_out = f"unset {' '.join(found)}, or start with torchrun"
    if not all(value.isdecimal() for value in found.values()) or not int(rank) < int(processes):
        raise PlanError(f"{said}: not what a launcher says; {way_out}")
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in group]
    if int(processes) > 1 and missing:
        raise PlanError(f"{said} without {', '.join(missing)}: not what a launcher says; {way_out}")
    return int(processes)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether somebody started this process as one of a group."""
    return count_processes(environment) > 1 or "TORCHELASTIC_RUN_ID" in environment


def check_gpus(processes: int) -> None:
    """Raises PlanError where that many processes of this machine would have to share a GPU."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise PlanError(
            f"{processes} processes on this machine, which shows {torch.cuda.device_count()} GPUs; use a plan of fewer "
            "devices, start them on more machines, or set CUDA_VISIBLE_DEVICES= to train on its cores"
        )


def launch(program: str, argv: Sequence[str], *, processes: int) -> int:
    """Run `python -m PROGRAM ARGV` that many times, as one group; the exit code is 0 or that of the first to fail.

    All of them end with the first that fails, and with this process, however it ends. Raises PlanError where there
    are not enough GPUs.
    """
    check_gpus(processes)
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
    end_with_us = partial(_end_with, os.getpid())
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = os.environ | group | place
            children.append(subprocess.Popen(command, env=environment, preexec_fn=end_with_us))
        return _wait(program, children)
    except KeyboardInterrupt:  # the leader says what there is to say
        _wait_for_all(children, _INTERRUPT_SECONDS)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        _wait_for_all(children, _GRACE_SECONDS)
        return EXIT_INTERRUPTED
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(program: str, children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the group, as soon as one has failed or all are done.

    Processes mostly fail of the same, and then the leader's word and code stand for all. A signal that ended one
    (SIGKILL: mostly the memory was full) is said here, as the others only see that a connection broke.
    """
    while not any(codes := [child.poll() for child in children]):
        if None not in codes:
            return EXIT_DONE
        time.sleep(_POLL_SECONDS)
    killed = {rank: signal.Signals(-code).name for rank, code in enumerate(codes) if code and code < 0}
    for rank, name in killed.items():
        print(f"{program}: process {rank} of {len(children)} was ended by {name}", file=sys.stderr)
    _wait_for_all(children[:1], _GRACE_SECONDS)
    if killed:
        return EXIT_FAILED
    code = children[0].returncode or next(code for code in codes if code)
    return code if code > 0 else EXIT_FAILED


def _wait_for_all(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Return when all have ended, or after that many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_SECONDS)


# Loaded here, not between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, also where nothing else of the parent could."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(EXIT_FAILED)
