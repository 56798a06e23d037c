"""The cost of a plan for one device: memory and traffic, by arithmetic. The twins' `cost.py` measure the same.

Source: ZeRO, arXiv 1910.02054, figure 1 and section 7. What a backend does differently is in its subclass of `Cost` in
`trainspec/backends/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.plans.plan import COMPUTE_DTYPE, STORED_DTYPE, Plan, Policy, StateKind, local_size


def width(dtype: str) -> int:
    """Bytes per number of a type."""
    return np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Collective:
    """A collective operation, made `times` times; `payload_bytes` is the size of the whole tensor reduced or gathered."""

    program: str
    kind: str
    dtype: str
    payload_bytes: int
    devices: int
    times: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device of a ring sends. An all-reduce is a reduce-scatter and an all-gather."""
        match self.kind:
            case "all-reduce":
                rounds = 2 * (self.devices - 1) / self.devices
            case "collective-permute":
                rounds = 1.0
            case _:
                rounds = (self.devices - 1) / self.devices
        return self.times * self.payload_bytes * rounds


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of training state on one device. `master` are float32 weights kept besides those computed with."""

    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return self.weights + self.gradients + self.master + self.moments


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device of a ring sends over data and fsdp in one update."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Bytes of both."""
        return self.gradients + self.weights


@dataclass(frozen=True)
class Cost(ABC):
    """Memory and traffic of one run on one backend. A subclass says what differs between backends."""

    model: ModelSpec
    plan: Plan
    policy: Policy
    reduce: Policy
    accumulation: int
    trained: tuple[Param, ...]
    frozen: tuple[Param, ...]

    def memory_use(self) -> MemoryUse:
        """The training state of one device, on the pipeline stage that holds most.

        Gradients are counted as they are between two accumulation slices. Frozen weights have neither gradients nor moments.
        """
        return max((self._memory_use(stage) for stage in range(self.plan.pipe)), key=lambda use: use.total)

    def _memory_use(self, stage: int) -> MemoryUse:
        stored, computed = width(STORED_DTYPE[self.policy]), width(COMPUTE_DTYPE[self.policy])
        state = self.elements(self.trained, "optimizer", stage)
        gradients = self.elements(self.trained, "gradients", stage)
        everything = (*self.trained, *self.frozen)
        return MemoryUse(
            weights=round(self.elements(everything, "weights", stage) * computed),
            gradients=round(gradients * (width(COMPUTE_DTYPE[self.reduce]) + self.extra_gradient_bytes)),
            master=round(state * stored) if self.has_master else 0,
            moments=round(2 * state * stored),
        )

    def traffic(self) -> Traffic:
        """2Ψ with replicated weights and 3Ψ with sharded ones, times (N - 1) / N.

        Gradients are reduce-scattered; then they are gathered where every device keeps them whole, else the updated weights
        are. Sharded weights, frozen ones too, are gathered for the forward and again for the backward pass.
        Raises ValueError for a pipeline.
        """
        plan = self.plan
        if plan.pipe > 1:
            raise ValueError("how often a pipeline gathers and reduces is not counted")
        scattered = plan.splits("gradients") or self.scatters_sums
        times = self.accumulation if plan.splits("gradients") or self.reduces_every_slice else 1
        gradients = times * sum(self.gradient_bytes(p, scattered) for p in self.trained)
        sent = width(COMPUTE_DTYPE[self.policy]) * (self.ranks - 1) / self.ranks
        if plan.splits("weights"):
            everything = (*self.trained, *self.frozen)
            gathered = sum(self.gathers(p) * local_size(p, plan, over_fsdp=False) for p in everything)
            return Traffic(gradients, self.accumulation * sent * gathered)
        own = sum(local_size(p, plan, over_fsdp=False) for p in self.trained)
        return Traffic(gradients, sent * own if plan.splits("optimizer") else 0.0)

    def gradient_bytes(self, param: Param, scattered: bool) -> float:
        """Bytes sent to reduce one gradient once."""
        size = local_size(param, self.plan, over_fsdp=False)
        return width(COMPUTE_DTYPE[self.reduce]) * size * self.reductions(scattered)

    def reductions(self, scattered: bool) -> float:
        """How often one device sends each byte of a gradient in one reduction."""
        share = (self.plan.replicas - 1) / self.plan.replicas
        return share if scattered else 2 * share

    @property
    @abstractmethod
    def ranks(self) -> int:
        """How many devices share the sharded training state."""

    @property
    @abstractmethod
    def has_master(self) -> bool:
        """Whether there are master weights besides those computed with."""

    @property
    @abstractmethod
    def extra_gradient_bytes(self) -> int:
        """Bytes per gradient element besides the sum in the type of `reduce`."""

    @property
    @abstractmethod
    def scatters_sums(self) -> bool:
        """Whether gradient sums are scattered even where the plan keeps gradients whole."""

    @property
    @abstractmethod
    def reduces_every_slice(self) -> bool:
        """Whether whole gradients are reduced after every accumulation slice instead of once."""

    @abstractmethod
    def elements(self, entries: Sequence[Param], kind: StateKind, stage: int) -> float:
        """How many elements a device of `stage` holds of that kind of state of `entries`."""

    @abstractmethod
    def gathers(self, param: Param) -> int:
        """How often a sharded weight is gathered per accumulation slice."""
