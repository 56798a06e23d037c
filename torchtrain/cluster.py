"""The processes of a run: joining them, their devices, and letting them go.

What a launcher says of them is in processes.py, starting them where no launcher has in launch.py.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchtrain import _deepspeed
from torchtrain import processes as launcher
from torchtrain.precision import use_exact_matmul
from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.plans.accelerators import Devices, accelerators, hides_gpus
from trainspec.plans.names import DeviceKind
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.runs.allocator import keep_freed_memory
from trainspec.runs.processes import Processes
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
    """What a run opens in this process: engines, by the functions that close them, and process groups.

    `store` is where the processes meet, if this one has opened it: it lasts as long as the process.
    """

    def __init__(self) -> None:
        self.engines: list[Callable[[], None]] = []
        self.groups: list[Any] = []
        self.store: Any = None

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
# Known before torch is loaded.
is_leader = launcher.is_leader


def start(recipe: Recipe) -> Run:
    """The recipe's run, with this process set up for it. Raises PlanError, also for an unsupported plan."""
    run = resolve_on(recipe, BACKENDS["torch"])
    set_up(run)
    return run


def set_up(run: Run) -> None:
    """Set this process up for a run: matmul precision, device, and the group of all processes.

    Raises PlanError if a launcher started another number of processes than the plan takes, or if they do not find each
    other or a GPU each.
    """
    recipe = run.recipe
    os.environ.update(launcher.describe_cluster(os.environ))
    count = launcher.count_processes(os.environ)
    if count != recipe.plan.devices:
        raise PlanError(
            f"the launcher started {count} processes, the plan takes {recipe.plan.devices}; start as many, or make "
            f"plan.pipe × plan.data × plan.fsdp × plan.tensor {count}"
        )
    check_accelerators()
    use_exact_matmul()
    if torch.cuda.is_available():
        # Slurm does not say how many processes are here; a local rank is refused where there are not enough GPUs for it.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        check_gpus(max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory(in_one_arena=False)
    if count > 1:
        _join()
    if _deepspeed.runs_on_deepspeed(recipe):
        for name, value in _ONE_PROCESS.items():
            os.environ.setdefault(name, value)
        _deepspeed.import_deepspeed().init_distributed(verbose=False)
        if is_leader():
            _deepspeed.report_version()


def processes() -> Processes:
    """The processes of the run, after `set_up`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), _exchange)


def _exchange(text: str) -> list[str]:
    """The texts of all processes, in their order; every process has to call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(size) for size in sizes)
    if not longest:
        return [""] * len(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [t[: int(n)].cpu().numpy().tobytes().decode() for t, n in zip(texts, sizes, strict=True)]


def _join() -> None:
    """Join the other processes, once: a launcher's store keeps the addresses of a first meeting."""
    if dist.is_initialized():
        return
    if launcher.STORE in os.environ:
        SESSION.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=int(os.environ.pop(launcher.STORE)),
        )
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PlanError(f"the processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    atexit.register(dist.destroy_process_group)


def finish() -> None:
    """Undo `set_up`, except for the group of several processes, which the next run in them uses again."""
    SESSION.close()


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
