"""The devices of a run in words, and the accelerators of the machine, whether or not a framework can use them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainspec.plans.names import Backend

# Where to look for device files and the kernel's list of PCI devices.
ROOT = Path("/")
# Google's PCI vendor id, and the device ids of its TPUs, v2 to v7 (jax._src.hardware_utils); its network cards and disks
# have the same vendor id.
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


@dataclass(frozen=True)
class Devices:
    """The devices of a run: `used` of the `available` ones of a kind, by `processes` processes.

    `memory_bytes` is the memory of one device, None where that is the machine's; `packages` are those of the backend
    whose versions can change numbers. `attention` is the kernel that attention is computed with, None where it is not known.
    """

    backend: Backend
    kind: str
    used: int
    available: int
    processes: int
    packages: tuple[str, ...]
    memory_bytes: int | None = None
    attention: str | None = None

    def __str__(self) -> str:
        share = f"{self.used}" if self.used == self.available else f"{self.used} of {self.available}"
        memory = f" with {self.memory_bytes / 2**30:,.1f} GiB each" if self.memory_bytes else ""
        return f"{share} × {self.kind}{memory}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class Accelerator:
    """The machine's GPUs or TPUs, as the device files that their driver makes."""

    kind: Literal["GPU", "TPU"]
    files: tuple[str, ...]

    def __str__(self) -> str:
        first, *others = self.files
        more = f" and {len(others)} more" if others else ""
        return f"this machine has a {self.kind} ({first}{more})"


def accelerators() -> list[Accelerator]:
    """The NVIDIA GPUs and TPUs that have device files; in a container, those that it was given.

    AMD's and WSL's device files also exist for graphics that cannot compute, so they prove nothing.
    """
    found: list[Accelerator] = []
    if gpus := _files("dev", r"nvidia\d+"):
        found.append(Accelerator("GPU", gpus))
    if tpus := _files("dev", r"accel\d+") + _vfio_tpus():
        found.append(Accelerator("TPU", tpus))
    return found


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether the user has hidden all GPUs with CUDA_VISIBLE_DEVICES."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _files(folder: str, pattern: str) -> tuple[str, ...]:
    """Files of a folder whose full name matches, lowest number first. On newer kernels /dev/accel is a folder."""
    home = ROOT / folder
    names = [name for name in (os.listdir(home) if home.is_dir() else ()) if re.fullmatch(pattern, name)]
    return tuple(f"/{folder}/{name}" for name in sorted(names, key=lambda n: (len(n), n)))


def _vfio_tpus() -> tuple[str, ...]:
    """TPUs from v5 on come through VFIO, whose files may be any device's: they count if PCI lists a TPU."""
    devices = (ROOT / "sys/bus/pci/devices").glob("*")
    has_tpu = any(_line(d / "vendor") == _GOOGLE and _line(d / "device") in _TPUS for d in devices)
    return _files("dev/vfio", r"(noiommu-)?\d+") if has_tpu else ()


def _line(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
