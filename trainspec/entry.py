"""An entry of THE TABLE: one weight with its initial value and its role in the model."""

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
    """Independent uniform values in ±1/sqrt(fan_in), as torch initializes a linear layer and PEFT LoRA's A."""

    fan_in: int


@dataclass(frozen=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True)
class Ones:
    """All one."""


@dataclass(frozen=True)
class FromText:
    """The embeddings, or keys and values, of `text` in the model (`trainspec.from_text`)."""

    text: str


@dataclass(frozen=True)
class FromWeights:
    """`make` of the starting values, in float64, of the weights `names`."""

    names: tuple[str, ...]
    make: Callable[..., Array]


Init = Normal | UniformFanIn | Zeros | Ones | FromText | FromWeights


@dataclass(frozen=True)
class Param:
    """One weight: canonical name, shape and its logical axes, initial value, whether it decays, role, and layer."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool
    role: Role
    layer: int | None = None

    @property
    def module(self) -> str:
        """The dotted name of the module that owns the weight."""
        return self.name.rsplit(".", 1)[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for dim in self.shape:
            total *= dim
        return total
