"""What a plan costs one device: the arithmetic of bytes held and bytes sent. The twins' `cost.py` measure the same.

Source: ZeRO, arXiv 1910.02054, figure 1 and section 7. What a backend does otherwise is a subclass of `Cost` in its file
of `trainspec/backends/`.
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
    """Bytes of one number of a type."""
    return np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Collective:
    """An operation between devices: `payload_bytes` is the whole of what is reduced or gathered, as one device sees it."""

    program: str
    kind: str
    dtype: str
    payload_bytes: int
    devices: int
    times: int

    @property
    def sent_bytes(self) -> float:
        """What one device of a ring sends: an all-reduce is a reduce-scatter and then an all-gather."""
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
    """Bytes of training state on one device. `master` are the float32 weights after a copy that is computed with."""

    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.master + self.moments


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in an update over data and fsdp, as a ring does it: gradients out, weights in."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Both ways."""
        return self.gradients + self.weights


@dataclass(frozen=True)
class Cost(ABC):
    """The arithmetic of one run on one backend: what is common here, what differs in the methods of a subclass."""

    model: ModelSpec
    plan: Plan
    policy: Policy
    reduce: Policy
    accumulation: int
    trained: tuple[Param, ...]
    frozen: tuple[Param, ...]

    def memory_use(self) -> MemoryUse:
        """What one device holds at most: gradients are those between two accumulation slices.

        A frozen weight has neither gradient nor moments. Of a pipeline's stages it is the one that holds most.
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
        """2Ψ with whole weights, 3Ψ where they are split, times (N - 1) / N: a reduction is reduce-scatter, then all-gather.

        The gather is of gradients where every device keeps them whole, else of the updated weights. Split weights are
        gathered for the forward and again for the backward pass, frozen ones too.
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
        """What is sent of one gradient in one reduction."""
        size = local_size(param, self.plan, over_fsdp=False)
        return width(COMPUTE_DTYPE[self.reduce]) * size * self.reductions(scattered)

    def reductions(self, scattered: bool) -> float:
        """How often each byte of a gradient is sent, from all to where it is kept."""
        share = (self.plan.replicas - 1) / self.plan.replicas
        return share if scattered else 2 * share

    @property
    @abstractmethod
    def ranks(self) -> int:
        """Over how many devices the training state is split."""

    @property
    @abstractmethod
    def has_master(self) -> bool:
        """Whether there are master weights beside those that are computed with."""

    @property
    @abstractmethod
    def extra_gradient_bytes(self) -> int:
        """Bytes of each gradient's element besides the sum in the type of `reduce`."""

    @property
    @abstractmethod
    def scatters_sums(self) -> bool:
        """Whether a sum of gradients that are kept whole is left in parts all the same."""

    @property
    @abstractmethod
    def reduces_every_slice(self) -> bool:
        """Whether gradients that are kept whole are reduced after each accumulation slice, not once."""

    @abstractmethod
    def elements(self, entries: Sequence[Param], part: StateKind, stage: int) -> float:
        """How many elements of `entries` a device of `stage` holds in that part of the training state."""

    @abstractmethod
    def gathers(self, param: Param) -> int:
        """How often a split weight is gathered in one accumulation slice."""
