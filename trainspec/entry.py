"""An entry of THE TABLE: one weight, how it starts, and what it is in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainspec.weight import Array

Role = Literal["embedding", "linear", "head", "norm", "adapter"]


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0 and standard deviation `std`."""

    std: float


@dataclass(frozen=True)
class UniformFanIn:
    """Independent uniform values in ±1/sqrt(fan_in): torch's start of a linear layer, PEFT's of LoRA's A."""

    fan_in: int


@dataclass(frozen=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True)
class Ones:
    """All one."""


@dataclass(frozen=True)
class FromText:
    """What `text` leaves in the model; `trainspec.from_text` makes it from the model's own weights."""

    text: str


@dataclass(frozen=True)
class FromWeights:
    """What `make` gives of the starting values, in float64, of the weights that are called `names`."""

    names: tuple[str, ...]
    make: Callable[..., Array]


Init = Normal | UniformFanIn | Zeros | Ones | FromText | FromWeights


@dataclass(frozen=True)
class Param:
    """One weight: its canonical name, shape and logical axes (same order), and how it starts and decays."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool
    role: Role
    layer: int | None = None

    @property
    def module(self) -> str:
        """The dotted name of the module that owns this weight."""
        return self.name.rsplit(".", 1)[0]

    @property
    def size(self) -> int:
        """How many elements it has."""
        total = 1
        for dim in self.shape:
            total *= dim
        return total
