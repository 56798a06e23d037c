"""The processes of a run: what a launcher says of them, joining them, their devices, and letting them go.

Starting them where no launcher has is in launch.py.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from torchtrain import _deepspeed
from torchtrain.precision import use_exact_matmul
from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.plans.accelerators import DeviceKind, Devices, accelerators, hides_gpus
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, resolve_on

# What a launcher would set; without RANK DeepSpeed looks for MPI. Port 0 lets the system choose a free one.
_ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


class Session:
    """What a run opens in this process: engines, by the functions that close them, and process groups."""

    def __init__(self) -> None:
        self.engines: list[Callable[[], None]] = []
        self.groups: list[Any] = []

    def close(self) -> None:
        """Close all of it, the last one first."""
        while self.engines:
            self.engines.pop()()
        # A group is destroyed when nobody reads from it any more. A process that failed does not wait for that: it keeps
        # its connections until it ends, so that the others do not fail before it has said why.
        if self.groups and sys.exc_info()[0] is not None:
            return
        if self.groups:
            # A group lasts as long as an engine refers to it, and engines refer to themselves. Its threads would stay, and
            # turn idly on the connections that other processes have closed.
            gc.collect()
            dist.barrier()
        while self.groups:
            _deepspeed.destroy_group(self.groups.pop())
        _deepspeed.reset()


SESSION = Session()


def start(recipe: Recipe) -> Run:
    """The recipe's run, with this process set up for it: matmul precision, device, and the group of all processes.

    Raises PlanError for an unsupported plan, if a launcher started another number of processes than the plan takes, or
    if they do not find each other or a GPU each.
    """
    run = resolve_on(recipe, BACKENDS["torch"])
    os.environ.update(describe_cluster(os.environ))
    processes = count_processes(os.environ)
    if processes != recipe.plan.devices:
        raise PlanError(
            f"the launcher started {processes} processes, the plan takes {recipe.plan.devices}; start as many, or make "
            f"plan.pipe × plan.data × plan.fsdp × plan.tensor {processes}"
        )
    check_accelerators()
    use_exact_matmul()
    if torch.cuda.is_available():
        # Slurm does not say how many processes are here; a local rank is refused where there are not enough GPUs for it.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        check_gpus(max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        torch.cuda.set_device(local_rank)
    if processes > 1:
        _join()
    if _deepspeed.runs_on_deepspeed(recipe):
        for name, value in _ONE_PROCESS.items():
            os.environ.setdefault(name, value)
        _deepspeed.import_deepspeed().init_distributed(verbose=False)
        if is_leader():
            _deepspeed.report_version()
    return run


def _join() -> None:
    """Join the other processes, once: a launcher's store keeps the addresses of a first meeting."""
    if dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PlanError(f"the processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    atexit.register(dist.destroy_process_group)


def finish() -> None:
    """Undo `start`, except for the group of several processes, which the next run in them uses again."""
    SESSION.close()


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


def check_gpus(processes: int) -> None:
    """Raises PlanError where that many processes of this machine would have to share a GPU."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise PlanError(
            f"{processes} processes on this machine, which shows {torch.cuda.device_count()} GPUs; use a plan of fewer "
            "devices, start them on more machines, or set CUDA_VISIBLE_DEVICES= to train on its cores"
        )


def check_accelerators() -> None:
    """Raises PlanError where this machine has a GPU or TPU that torch cannot use and the user does not hide."""
    if torch.cuda.is_available() or hides_gpus(os.environ):
        return
    for accelerator in accelerators():
        way_out = "or set CUDA_VISIBLE_DEVICES= to train on the cores"
        if accelerator.kind == "TPU":
            raise PlanError(f"{accelerator}, which torchtrain does not use; train with jaxtrain, {way_out}")
        reason = f"it sees {torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            reason = str(error)
        raise PlanError(
            f"{accelerator}, and torch {torch.__version__} cannot use it: {reason}; install a driver and a build of torch "
            f"that go with each other, {way_out}"
        )


def default_devices() -> tuple[DeviceKind, int]:
    """The kind of device that a run in this process computes on, and how many are here. Raises PlanError as `start` does."""
    check_accelerators()
    return ("gpu", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 1)


def describe_devices(plan: Plan) -> Devices:
    """What a run with this plan computes on: a device for each process."""
    packages = ("torch", "transformers", "peft", "deepspeed", "numpy")
    if not torch.cuda.is_available():
        return Devices("torch", "cpu", plan.devices, plan.devices, plan.devices, packages)
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    kind, count = f"{gpu.name} (CUDA {torch.version.cuda})", max(plan.devices, torch.cuda.device_count())
    return Devices("torch", kind, plan.devices, count, plan.devices, packages, gpu.total_memory)
