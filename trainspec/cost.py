"""What a plan costs one device: the arithmetic of bytes held and bytes sent. The twins' `cost.py` measure the same.

Source: ZeRO, arXiv 1910.02054, figure 1 and section 7; what each backend does otherwise is said where it is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainspec.families import family_of
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.pipeline import stack_order, stages_of
from trainspec.plan import COMPUTE_DTYPE, STORED_DTYPE, Backend, Part, Plan, Policy, local_size
from trainspec.recipe import Recipe


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
class Held:
    """Bytes of training state on one device. `master` are the float32 weights behind a copy that is computed with."""

    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.master + self.moments


@dataclass(frozen=True)
class Moved:
    """Bytes that one device sends in an update over data and fsdp, as a ring does it: gradients out, weights in."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Both ways."""
        return self.gradients + self.weights


@dataclass(frozen=True)
class Cost:
    """The arithmetic of one recipe on one backend."""

    model: ModelSpec
    plan: Plan
    policy: Policy
    reduce: Policy
    accumulation: int
    trained: tuple[Param, ...]
    frozen: tuple[Param, ...]
    backend: Backend

    def held(self) -> Held:
        """What one device holds at most: gradients are those between two microbatches.

        JAX splits over fsdp and repeats over data; the sum of microbatches' gradients has the type of `reduce`.
        DeepSpeed splits over data × fsdp, and from stage 1 on, which is also that of every pipeline, it keeps a master
        copy in float32 even where weights are float32. A frozen weight has neither gradient nor moments. DeepSpeed's
        padding of flat buffers is left out. Of a pipeline's stages it is the one that holds most.
        """
        return max((self._held(stage) for stage in range(self.plan.pipe)), key=lambda held: held.total)

    def _held(self, stage: int) -> Held:
        stored, computed = width(STORED_DTYPE[self.policy]), width(COMPUTE_DTYPE[self.policy])
        is_flat = self.backend == "torch" and (self.plan.splits("optimizer") or self.plan.pipe > 1)
        state = self._elements(self.trained, "optimizer", stage)
        # BF16_Optimizer has its sum beside the gradients that the backward pass leaves.
        beside = computed if self._is_bf16_optimizer else 0
        gradients = self._elements(self.trained, "gradients", stage)
        return Held(
            weights=round(self._elements((*self.trained, *self.frozen), "weights", stage) * computed),
            gradients=round(gradients * (width(COMPUTE_DTYPE[self.reduce]) + beside)),
            master=round(state * stored) if is_flat or self.policy == "bf16" else 0,
            moments=round(2 * state * stored),
        )

    def moved(self) -> Moved:
        """2Ψ with whole weights, 3Ψ where they are split, times (N - 1) / N: a reduction is reduce-scatter, then all-gather.

        The gather is of gradients where every device keeps them whole, else of the updated weights. Split weights are
        gathered for the forward and again for the backward pass, frozen ones too. Not so:
        JAX with `shards: optimizer` keeps whole gradients and has to gather weights as well: 3Ψ. It reduces the gradients
        of every microbatch, DeepSpeed up to stage 1 their sum. DeepSpeed's BF16_Optimizer (stage 1, bf16, summed in
        fp32) gathers gradients and weights, too. From its second microbatch on DeepSpeed's stage 3 keeps what it fetched
        ahead at the turn to the backward pass, and gathers less than this. Raises ValueError for a pipeline.
        """
        plan = self.plan
        if plan.pipe > 1:
            raise ValueError("how often a pipeline gathers and reduces is not counted")
        scattered = plan.splits("gradients") or (
            self.backend == "torch" and plan.splits("optimizer") and not self._is_bf16_optimizer
        )
        times = self.accumulation if self.backend == "jax" or plan.splits("gradients") else 1
        gradients = times * sum(self._gradient_bytes(p, scattered) for p in self.trained)
        sent = width(COMPUTE_DTYPE[self.policy]) * (self._ranks - 1) / self._ranks
        if plan.splits("weights"):
            everything = (*self.trained, *self.frozen)
            gathered = sum(self._gathers(p) * local_size(p, plan, over_fsdp=False) for p in everything)
            return Moved(gradients, self.accumulation * sent * gathered)
        own = sum(local_size(p, plan, over_fsdp=False) for p in self.trained)
        return Moved(gradients, sent * own if plan.splits("optimizer") else 0.0)

    @property
    def _ranks(self) -> int:
        """Over how many devices the state is split."""
        return self.plan.replicas if self.backend == "torch" else self.plan.fsdp

    @property
    def _is_bf16_optimizer(self) -> bool:
        return (
            self.backend == "torch"
            and (self.policy, self.reduce) == ("bf16", "fp32")
            and not self.plan.splits("gradients")
        )

    def _elements(self, rows: Sequence[Param], part: Part, stage: int) -> float:
        if self.backend == "jax":
            # Embedding, norm and head are on every stage, and a stage of fewer layers is filled up.
            share = len(stack_order(self.plan, self.model.layers)) / self.model.layers / self.plan.pipe
            return sum(
                local_size(p, self.plan, over_fsdp=self.plan.splits(part)) * (1 if p.layer is None else share)
                for p in rows
            )
        mine = [p for p in rows if stage in stages_of(p, self.plan, self.model)]
        whole = sum(local_size(p, self.plan, over_fsdp=False) for p in mine)
        return whole / self._ranks if self.plan.splits(part) else whole

    def _reductions(self, scattered: bool) -> float:
        """How often each byte of a gradient is sent, from all to where it is kept."""
        share = (self.plan.replicas - 1) / self.plan.replicas
        # Over data and fsdp at once JAX's compiler makes one sum for all of them, and cuts it.
        is_cut = self.backend == "jax" and self.plan.data > 1
        return share if scattered and not is_cut else 2 * share

    def _gradient_bytes(self, param: Param, scattered: bool) -> float:
        """What is sent of one gradient in one reduction.

        On JAX sums over tokens that are no matrix product are float32 or wider, and are whole before they are rounded.
        """
        summed, size = width(COMPUTE_DTYPE[self.reduce]), local_size(param, self.plan, over_fsdp=False)
        is_widened = self.backend == "jax" and (param.role == "embedding" or len(param.shape) == 1)
        if is_widened and summed < width("float32"):
            return width("float32") * size * self._reductions(scattered=False)
        return summed * size * self._reductions(scattered)

    def _gathers(self, param: Param) -> int:
        """In one microbatch: for the forward pass, and where the backward pass needs the weight.

        On JAX a lookup's does not need its table. In torch there is no backward pass before the first trained weight:
        under a frozen embedding it ends behind the first layer's projections, whose input nothing depends on but a
        prompt in front of it.
        """
        if self.backend == "jax":
            is_tied = all(p.role != "head" for p in (*self.trained, *self.frozen))
            return 1 if param.role == "embedding" and not is_tied else 2
        if any("virtual" in p.axes and "embed" in p.axes for p in self.trained):
            return 1 if param.role == "embedding" and param in self.frozen else 2
        readers = family_of(self.model).stream_readers
        starts = param.role == "embedding" or (param.layer == 0 and param.module.endswith(readers))
        return 1 if starts and param in self.frozen else 2


def cost_of(recipe: Recipe, model: ModelSpec, backend: Backend) -> Cost:
    """The cost of a recipe."""
    trained = trainable_table(model, recipe.method)
    return Cost(
        model=model,
        plan=recipe.plan,
        policy=recipe.precision.policy,
        reduce=recipe.precision.reduce,
        accumulation=recipe.batch.accumulation,
        trained=trained,
        frozen=tuple(p for p in full_table(model, recipe.method) if p not in trained),
        backend=backend,
    )
