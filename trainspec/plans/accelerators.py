"""The devices of a run in words, and the accelerators that a machine has whether or not a framework can use them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainspec.plans.plan import Backend

# Where device files and the kernel's list of PCI devices are looked for.
ROOT = Path("/")
# Google's PCI vendor, and those of its devices that are TPUs, v2 to v7 (jax._src.hardware_utils): its network cards
# and disks have the same vendor.
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


@dataclass(frozen=True)
class Devices:
    """What a run computes on: `used` of the `available` devices of a kind, by that many processes.

    `memory_bytes` is what one device has, None where it is the machine's own memory; `packages` are those of the
    backend whose versions decide numbers.
    """

    backend: Backend
    kind: str
    used: int
    available: int
    processes: int
    packages: tuple[str, ...]
    memory_bytes: int | None = None

    def __str__(self) -> str:
        share = f"{self.used}" if self.used == self.available else f"{self.used} of {self.available}"
        memory = f" with {self.memory_bytes / 2**30:,.1f} GiB each" if self.memory_bytes else ""
        return f"{share} × {self.kind}{memory}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class Accelerator:
    """What the machine shows of its GPUs or TPUs: the files under which a driver offers them."""

    kind: Literal["GPU", "TPU"]
    files: tuple[str, ...]

    def __str__(self) -> str:
        first, *others = self.files
        more = f" and {len(others)} more" if others else ""
        return f"this machine has a {self.kind} ({first}{more})"


def accelerators() -> list[Accelerator]:
    """The NVIDIA GPUs and the TPUs that device files show; of a container those that it was given.

    AMD's and WSL's files are there with graphics that compute nothing as well, so they say nothing.
    """
    found: list[Accelerator] = []
    if gpus := _files("dev", r"nvidia\d+"):
        found.append(Accelerator("GPU", gpus))
    if tpus := _files("dev", r"accel\d+") + _vfio_tpus():
        found.append(Accelerator("TPU", tpus))
    return found


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether a user has said, in CUDA's own way, that no GPU is to be used."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _files(folder: str, pattern: str) -> tuple[str, ...]:
    """Files of a folder whose whole name fits, lowest number first. Newer kernels have a folder /dev/accel."""
    home = ROOT / folder
    names = [name for name in (os.listdir(home) if home.is_dir() else ()) if re.fullmatch(pattern, name)]
    return tuple(f"/{folder}/{name}" for name in sorted(names, key=lambda n: (len(n), n)))


def _vfio_tpus() -> tuple[str, ...]:
    """TPUs from v5 on are handed over by VFIO, whose files may be any device's: they count where PCI shows a TPU."""
    devices = (ROOT / "sys/bus/pci/devices").glob("*")
    has_tpu = any(_line(d / "vendor") == _GOOGLE and _line(d / "device") in _TPUS for d in devices)
    return _files("dev/vfio", r"(noiommu-)?\d+") if has_tpu else ()


def _line(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
