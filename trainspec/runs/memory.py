"""Out of memory: how much was requested, how much there is, and what helps. Every framework words it differently."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError, UserError
from trainspec.methods import leading_positions
from trainspec.plans.accelerators import Devices
from trainspec.plans.capabilities import check_supported
from trainspec.plans.plan import Backend, Plan
from trainspec.runs.run import Run

GIB = 2**30
# XLA writes 15.75G for gibibytes, numpy "128. TiB", torch "20.00 MiB"; all write "N bytes" for exact numbers.
_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = r"([\d.]+) ?(bytes|[KMGTP]?i?B|[KMGTP])\b"
# Messages about memory. XLA's RESOURCE_EXHAUSTED alone may be a quota, or the size of a message; a TPU's other memories
# (vmem, smem) concern a kernel, and no setting of a recipe helps.
_LACK = re.compile(
    r"out of memory(?! in memory space (?!hbm))|(can.t|cannot|failed to) allocate|attempting to (allocate|reserve)"
    r"|OUT_OF_MEMORY|STATUS_ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)
_ASKED = (
    re.compile(r"(?:allocate|allocating|reserve)(?: request for)? " + _SIZE, re.IGNORECASE),
    re.compile(r"\bUsed " + _SIZE + r" of", re.IGNORECASE),  # a TPU's compiler
)
_THERE = (
    re.compile(r"total capacity of " + _SIZE),  # torch on a GPU
    re.compile(r"\bUsed [\d.]+\w+ of " + _SIZE + r" \w*hbm"),  # a TPU's compiler
)
_FREE = (
    re.compile(r"of which " + _SIZE + r" is free"),  # torch on a GPU
    re.compile(r"[Tt]here are " + _SIZE + r" free"),  # a TPU
)
# The machine's memory, whatever the run computes on.
_HOST = re.compile(r"DefaultCPUAllocator|for an array with shape|unable to mmap|std::bad_alloc")


@dataclass(frozen=True)
class MemoryShortage:
    """A failed allocation, in the memory of the device or of the machine; sizes in bytes where they are known."""

    where: Literal["device", "machine"]
    asked: float | None = None
    there: float | None = None
    free: float | None = None


def memory_shortage(error: BaseException) -> MemoryShortage | None:
    """The memory shortage that an error reports; None for any other error."""
    if isinstance(error, UserError):
        return None
    text = str(error)
    ours = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    theirs = isinstance(error, RuntimeError) and _LACK.search(text)
    if not ours and not theirs:
        return None
    where = "machine" if ours or _HOST.search(text) else "device"
    return MemoryShortage(where, *(_first_size(patterns, text) for patterns in (_ASKED, _THERE, _FREE)))


def describe_shortage(lack: MemoryShortage, *, devices: Devices | None = None, run: Run | None = None) -> str:
    """The shortage in one line, with what helps where run and devices are known."""
    on_host = lack.where == "machine" or (devices is not None and devices.memory_bytes is None)
    parts = [f"asked for {_gib(lack.asked)}"] if lack.asked else []
    if on_host:
        size, whose = host_memory()
        parts.append(f"{whose} {_gib(size)}")
    elif there := lack.there or (devices.memory_bytes if devices else None):
        free = f", {_gib(lack.free)} of it free" if lack.free is not None else ""
        parts.append(f"a device has {_gib(there)}{free}")
    figures = f": {', '.join(parts)}" if parts else ""
    line = f"out of {'memory' if on_host else 'device memory'}{figures}"
    if run is None or devices is None:
        return line
    if on_host and devices.memory_bytes is not None:
        return f"{line}; what helps: fewer processes on this machine, or one with more memory"
    return f"{line}; what helps, in this order: {', '.join(what_helps(run, devices.backend))}"


def what_helps(run: Run, backend: Backend) -> list[str]:
    """Settings that need less memory for the same training, cheapest first; the last one changes the examples."""
    recipe = run.recipe
    plan, batch = recipe.plan, recipe.batch
    keeps_scores = plan.attention == "reference" and recipe.precision.policy != "fp64"
    settings = ["plan.attention=auto"] if keeps_scores else []
    by_itself = plan.model_copy(update={"loss_chunk": "auto"})
    settings += (
        ["plan.loss_chunk=auto"] if positions_at_once(by_itself, run) < positions_at_once(plan, run) else []
    )
    settings += ["plan.remat=full"] if plan.remat == "none" else []
    shares = plan.microbatches * plan.replicas
    more = (n for n in range(batch.accumulation + 1, batch.global_examples // shares + 1))
    fits = next((n for n in more if batch.global_examples % (n * shares) == 0), None)
    if fits:
        settings.append(f"batch.accumulation={fits} or more")
    wider = plan.fsdp if plan.fsdp > 1 else 2
    sharded = plan.model_copy(update={"fsdp": wider, "shards": "params"})
    if plan.shards != "params" and _is_supported(sharded, run, backend):
        settings.append("plan.shards=params" + (" with plan.fsdp=2 or more" if plan.fsdp == 1 else ""))
    elif plan.shards != "nothing":
        settings.append(f"plan.fsdp above {plan.fsdp}")
    return [*settings, f"data.sequence_tokens below {recipe.data.sequence_tokens}"]


def host_memory() -> tuple[int, str]:
    """How many bytes of memory this process may use, and what sets the limit: machine, container or shell."""
    limits = [(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text(encoding="utf-8").strip()).isdecimal():
            limits.append((int(text), "this container has"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append((soft, "this process may have (ulimit -v)"))
    return min(limits)


def available_memory() -> int:
    """How many bytes can still be used: what the system says is available, within this process's limit."""
    limit, _ = host_memory()
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([limit, *available])


def positions_at_once(plan: Plan, run: Run) -> int:
    """For how many positions of each row a pass of training makes logits at once, under that plan."""
    batch, shares = run.recipe.batch, plan.microbatches * plan.replicas
    rows = math.ceil(batch.global_examples / (batch.accumulation * shares))
    positions = leading_positions(run.recipe.method) + run.recipe.data.sequence_tokens
    return plan.positions_at_once(rows, positions, run.spec.vocab)


def _is_supported(plan: Plan, run: Run, backend: Backend) -> bool:
    try:
        check_supported(plan, run.recipe.precision.policy, BACKENDS[backend])
    except PlanError:
        return False
    return True


def _first_size(patterns: tuple[re.Pattern[str], ...], text: str) -> float | None:
    match = next((match for pattern in patterns if (match := pattern.search(text))), None)
    if match is None:
        return None
    unit = match[2].lower().removesuffix("ytes")
    return float(match[1]) * 1024 ** _UNITS[unit.rstrip("b").rstrip("i")]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"
