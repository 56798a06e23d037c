"""torch with DeepSpeed, one process per device; plain torch in fp64, which DeepSpeed does not have."""

from __future__ import annotations

from collections.abc import Sequence

from trainspec.families import family_of
from trainspec.params import Param
from trainspec.plans.capabilities import Capabilities, Limit
from trainspec.plans.cost import Cost, width
from trainspec.plans.pipeline import stages_of
from trainspec.plans.plan import COMPUTE_DTYPE, StateKind, local_size


class TorchCost(Cost):
    """DeepSpeed shards over data × fsdp. The padding of its flat buffers is not counted.

    From the second accumulation slice on, stage 3 keeps the weights that it has prefetched for the backward pass, and
    gathers less than is counted here.
    """

    @property
    def ranks(self) -> int:
        """The devices of data × fsdp."""
        return self.plan.replicas

    @property
    def has_master(self) -> bool:
        """From ZeRO stage 1 on, which every pipeline uses, even where weights are float32."""
        return self.plan.splits("optimizer") or self.plan.pipe > 1 or self.policy == "bf16"

    @property
    def extra_gradient_bytes(self) -> int:
        """BF16_Optimizer keeps its sum besides the gradients of the backward pass."""
        return width(COMPUTE_DTYPE[self.policy]) if self._is_bf16_optimizer else 0

    @property
    def scatters_sums(self) -> bool:
        """From stage 1 on; but BF16_Optimizer (stage 1, bf16, summed in fp32) gathers gradients as well as weights."""
        return self.plan.splits("optimizer") and not self._is_bf16_optimizer

    @property
    def reduces_every_slice(self) -> bool:
        """Up to stage 1 DeepSpeed reduces the sum over the slices."""
        return False

    @property
    def _is_bf16_optimizer(self) -> bool:
        return (self.policy, self.reduce) == ("bf16", "fp32") and not self.plan.splits("gradients")

    def elements(self, entries: Sequence[Param], kind: StateKind, stage: int) -> float:
        """A process holds the weights of its stage."""
        mine = [p for p in entries if stage in stages_of(p, self.plan, self.model)]
        whole = sum(local_size(p, self.plan, over_fsdp=False) for p in mine)
        return whole / self.ranks if self.plan.splits(kind) else whole

    def gathers(self, param: Param) -> int:
        """Twice; once where the backward pass, which ends at the first trained weight, does not need the weight.

        With a frozen embedding and no trainable prompt, backward stops at the first layer's q, k and v projections.
        """
        if any("virtual" in p.axes and "embed" in p.axes for p in self.trained):
            return 1 if param.role == "embedding" and param in self.frozen else 2
        readers = family_of(self.model).stream_readers
        starts = param.role == "embedding" or (param.layer == 0 and param.module.endswith(readers))
        return 1 if starts and param in self.frozen else 2


_LIMITS = (
    # DeepSpeed's pipeline has one schedule, no float64, and no ZeRO stage but 1 that clips by the whole norm.
    Limit(
        pipelined=True,
        precisions=("fp64",),
        refusal="plan.pipe={plan.pipe} with precision.policy=fp64: DeepSpeed has no float64; use precision.policy=fp32 "
        "(parity check: --precision fp32), plan.pipe=1 plan.microbatches=1, or the jax backend",
    ),
    Limit(
        pipelined=True,
        schedules=("gpipe", "interleaved"),
        refusal="plan.schedule={plan.schedule}: DeepSpeed's pipeline runs 1f1b; use plan.schedule=1f1b, "
        "or the jax backend",
    ),
    Limit(
        pipelined=True,
        shards=("gradients", "params"),
        refusal="plan.shards={plan.shards} with plan.pipe={plan.pipe}: DeepSpeed's pipeline has no ZeRO stage above 1; "
        "use plan.shards=optimizer, or plan.pipe=1 plan.microbatches=1 plan.fsdp={fsdp_of_all}",
    ),
    Limit(
        pipelined=True,
        replicated=True,
        shards=("nothing",),
        refusal="plan.shards=nothing with plan.pipe={plan.pipe}: DeepSpeed's stage 0 leaves the later stages out of the norm "
        "that it clips by; use plan.fsdp={plan.replicas} plan.data=1 plan.shards=optimizer",
    ),
    Limit(
        precisions=("fp64",),
        shards=("optimizer", "gradients", "params"),
        refusal="plan.shards={plan.shards} with precision.policy=fp64: DeepSpeed has no float64; use plan.shards=nothing, "
        "precision.policy=fp32, or the jax backend",
    ),
    Limit(
        replicated=True,
        precisions=("bf16",),
        shards=("nothing",),
        refusal="plan.shards=nothing with precision.policy=bf16: DeepSpeed's stage 0 makes a hidden first update; "
        "use plan.fsdp={plan.replicas} plan.data=1 plan.shards=optimizer",
    ),
)

BACKEND = Capabilities(
    name="torch",
    program="torchtrain",
    limits=_LIMITS,
    # DeepSpeed splits a flat buffer and pads it.
    pads_shards=True,
    # It always computes the gradient of the stage's output.
    idle_first_stage="plan.pipe={plan.pipe}: stage 0 trains nothing, which DeepSpeed's pipeline cannot run; "
    "let method.targets name a module of the first layers, or use the jax backend",
    lockstep_schedules=(),
    has_process_per_device=True,
    cost=TorchCost,
    runs_on=("cpu", "gpu"),
    no_native_format="checkpoint.format=native: DeepSpeed's own checkpoints are pickles, and torchtrain writes none; use "
    "checkpoint.format=portable, to which every process writes its shards as well",
)
