"""What a launcher says of the processes of a run. Light: it is read before torch is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from trainspec.errors import PlanError

# The file descriptor, in the leader of processes that `launch` started, of the socket for the store at which they meet.
STORE = "TWINTRAIN_STORE_FD"


def is_leader() -> bool:
    """Whether this is the one process that has the console and writes files."""
    return (os.environ | describe_cluster(os.environ)).get("RANK", "0") == "0"


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

    Raises PlanError for what no launcher says, such as a WORLD_SIZE that another run's shell kept.
    """
    group = {**environment, **describe_cluster(environment)}
    values = {name: group[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in group}
    processes, rank = values.get("WORLD_SIZE", "1"), values.get("RANK", "0")
    said = " ".join(f"{name}={value}" for name, value in values.items())
    way_out = f"unset {' '.join(values)}, or start with torchrun"
    if not all(value.isdecimal() for value in values.values()) or not int(rank) < int(processes):
        raise PlanError(f"{said}: not what a launcher says; {way_out}")
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in group]
    if int(processes) > 1 and missing:
        raise PlanError(f"{said} without {', '.join(missing)}: not what a launcher says; {way_out}")
    return int(processes)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of a group."""
    return count_processes(environment) > 1 or "TORCHELASTIC_RUN_ID" in environment
