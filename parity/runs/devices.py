"""The devices that the programs of a check compute on: who gets which, what is here, and the environment of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainspec.backends import BACKENDS
from trainspec.errors import EXIT_DONE, EXIT_MACHINE, MachineError, UserError
from trainspec.plans.accelerators import accelerators
from trainspec.plans.names import Backend, Device, DeviceKind

# The backend that computes the float64 reference of both sides, on one device.
REFERENCE_BACKEND: Backend = "jax"
# A check runs the same programs again, for its reference or a failing step, so slow compilations are cached.
COMPILE_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("build/jax-cache").absolute()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
# Threads that spin while waiting take the cores from working ones: up to five times the wall time in torch.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
# What the user's environment overrides. JAX would take three quarters of a GPU's memory at its start, and leave torch's
# libraries little; cuBLAS repeats its bits from run to run only with a work space of fixed size.
DEFAULTS: Mapping[DeviceKind, Mapping[str, str]] = {
    "cpu": {},
    "gpu": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    "tpu": {},
}
# What it does not override: the device, and products of float32 numbers in float32. Without NVIDIA's own switch a library
# may round their factors to TF32, ten bits of mantissa.
FORCED: Mapping[DeviceKind, Mapping[str, str]] = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"JAX_PLATFORMS": "cuda,cpu", "NVIDIA_TF32_OVERRIDE": "0"},
    "tpu": {"JAX_PLATFORMS": "tpu,cpu", "CUDA_VISIBLE_DEVICES": ""},
}
IN_WORDS: Mapping[DeviceKind, str] = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


def environment(kind: DeviceKind, user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a check's program that computes on that kind of device; `user` is the user's own."""
    return {**QUIET_THREADS, **COMPILE_CACHE, **DEFAULTS[kind], **user, **FORCED[kind]}


# Finds what a backend has here, told to look for a device: the kind, and how many.
Look = Callable[[Backend, Device], tuple[DeviceKind, int]]


@dataclass(frozen=True)
class Placement:
    """The kind of device that each program of a check computes on. `reason`: why the reference's is another than was asked."""

    left: DeviceKind = "cpu"
    right: DeviceKind = "cpu"
    reference: DeviceKind = "cpu"
    reason: str | None = None

    def of(self, program: str) -> DeviceKind:
        """That of `left`, `right` or `reference`."""
        return getattr(self, program)

    @property
    def on_cores(self) -> bool:
        """Whether all compute on the machine's cores. Others run one after the other: they share a device."""
        return {self.left, self.right, self.reference} == {"cpu"}


ON_CORES = Placement()


@dataclass(frozen=True)
class Program:
    """A program of a check: its name, its words for the user, its backend, the device that is asked for, and how many.

    `on_cores` is what a user writes to have it alone compute on the cores; None where that cannot be asked for.
    """

    name: str
    words: str
    backend: Backend
    device: Device
    devices: int = 1
    on_cores: str | None = None


def placed(
    wanted: Iterable[Program],
    *,
    float64: bool,
    look: Look,
) -> Placement:
    """The device of every program.

    Raises UserError where there is no such device, or not as many as the plan takes; MachineError where a program fails that
    looks for it. A float64 reference is computed on the cores where the others are on a TPU.
    """
    kinds: dict[str, DeviceKind] = {}
    reason, wanted = None, list(wanted)
    asking = list(dict.fromkeys((each.backend, each.device) for each in wanted if _must_look(each)))
    with ThreadPoolExecutor(max(1, len(asking))) as threads:
        seen = dict(zip(asking, threads.map(lambda each: look(*each), asking), strict=True))
    for each in wanted:
        kind, count = seen.get((each.backend, each.device), ("cpu", 0))
        if each.name == "reference" and "tpu" in (kind, each.device):
            reason = "a TPU has no float64, so the reference is computed on the cores"
            continue
        if kind == "tpu" and float64:
            raise UserError(
                f"{each.words}: a TPU has no float64; use --precision fp32 or bf16, or {_way_out(each)}"
            )
        if each.device not in ("auto", kind):
            raise UserError(
                f"{each.words}: {BACKENDS[each.backend].program} finds no {IN_WORDS[each.device]} here, only the cores; "
                f"{_way_out(each)}"
            )
        if kind != "cpu" and count < each.devices:
            are = f"is 1 {IN_WORDS[kind]}" if count == 1 else f"are {count} {IN_WORDS[kind]}s"
            raise UserError(
                f"{each.words}: the plan takes {each.devices} devices, and here {are}; use a plan of {count}, or "
                f"{_way_out(each)}, which are as many devices as a plan takes"
            )
        kinds[each.name] = kind
    return Placement(**kinds, reason=reason)


def _must_look(wanted: Program) -> bool:
    """Whether its backend must say what it finds. Raises UserError where it cannot find what is asked for."""
    here = {accelerator.kind.lower() for accelerator in accelerators()}
    runs_on = BACKENDS[wanted.backend].runs_on
    match wanted.device:
        case "cpu":
            return False
        case "auto":
            return bool(here & set(runs_on))
        case kind:
            if wanted.name == "reference" and kind == "tpu":
                return False
            if kind not in runs_on:
                program = BACKENDS[wanted.backend].program
                raise UserError(
                    f"{wanted.words}: {program} does not run on a {IN_WORDS[kind]}; {_way_out(wanted)}"
                )
            if kind not in here:
                raise UserError(f"{wanted.words}: this machine has no {IN_WORDS[kind]}; {_way_out(wanted)}")
            return True


def _way_out(wanted: Program) -> str:
    alone = f", or this side alone ({wanted.on_cores})" if wanted.on_cores else ""
    return f"compute on the cores (--device cpu){alone}"


def look_for(backend: Backend, device: Device) -> tuple[DeviceKind, int]:
    """The kind of device that a backend finds here, told to look for `device`, and how many; asked of a program of its own."""
    program = BACKENDS[backend].program
    asked = dict(os.environ) if device == "auto" else environment(device)
    command = [sys.executable, "-m", "parity.runs.find_devices", backend]
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**QUIET_THREADS, **asked}, check=False
    )
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("find_devices: ")
    if ended.returncode == EXIT_DONE:
        # Libraries may print before it, and as they end.
        found = next(line for line in reversed(ended.stdout.splitlines()) if line.startswith("["))
        kind, count = json.loads(found)
        return kind, count
    line = f"{program} cannot say what devices are here: {last}"
    raise MachineError(line) if ended.returncode == EXIT_MACHINE or ended.returncode < 0 else UserError(line)
