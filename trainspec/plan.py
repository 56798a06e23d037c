"""The plan: over which devices a run is spread, which rule splits what, and what each backend can do of it.

Mesh axes are always all there, in the order of MESH_AXES, the last one fastest. `data` × `fsdp` split the rows of a
batch, `fsdp` what `shards` names of the training state, `tensor` the wide dimensions of every layer, `pipe` the layers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainspec.errors import PlanError
from trainspec.model import ModelSpec
from trainspec.params import Param

Backend = Literal["jax", "torch"]
Policy = Literal["fp64", "fp32", "bf16"]
Part = Literal["weights", "gradients", "optimizer"]
Count = Annotated[int, Field(ge=1)]

# numpy names; see docs/numerics.md. What a trained weight (the master) and the optimizer's moments are stored in,
STORED_DTYPE: dict[Policy, str] = {"fp64": "float64", "fp32": "float32", "bf16": "float32"}
# what the forward pass computes with, frozen weights are stored in, and `precision.reduce` sums gradients in.
COMPUTE_DTYPE: dict[Policy, str] = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}

MESH_AXES = ("pipe", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis of a weight -> mesh axis; what is not listed (rank) is whole on every device.
WEIGHT_AXES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
# Logical axis of an activation -> mesh axes.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "stage": ("pipe",),
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
# What each setting of `shards` splits over fsdp: ZeRO's stages 0 to 3 (arXiv 1910.02054).
SPLIT: dict[str, tuple[Part, ...]] = {
    "nothing": (),
    "optimizer": ("optimizer",),
    "gradients": ("optimizer", "gradients"),
    "params": ("optimizer", "gradients", "weights"),
}
DimAxes = tuple[tuple[str, ...], ...]


class Plan(BaseModel):
    """Mesh sizes, what is sharded over `fsdp` (ZeRO 0 to 3 in neutral words), and what is recomputed.

    Each of the `batch.accumulation` parts of a batch goes through the `pipe` stages as `microbatches`, in the order of
    `schedule`; under `interleaved` a stage holds `chunks` pieces of the model instead of one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    pipe: Count = 1
    data: Count = 1
    fsdp: Count = 1
    tensor: Count = 1
    shards: Literal["nothing", "optimizer", "gradients", "params"] = "nothing"
    microbatches: Count = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    chunks: Count = 2
    remat: Literal["none", "full"] = "none"

    @property
    def devices(self) -> int:
        """How many devices the plan takes."""
        return self.pipe * self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> int:
        """Into how many parts the rows of a microbatch are split."""
        return self.data * self.fsdp

    @property
    def pieces(self) -> int:
        """How many pieces of the model a stage of the pipeline holds."""
        return self.chunks if self.schedule == "interleaved" and self.pipe > 1 else 1

    def microbatches_of(self, rows: int) -> int:
        """Into how many microbatches rows go that are not a part of a training batch: one where they do not divide."""
        return self.microbatches if rows % (self.microbatches * self.replicas) == 0 else 1

    def splits(self, part: Part) -> bool:
        """Whether `shards` splits that part of the training state over fsdp."""
        return self.fsdp > 1 and part in SPLIT[self.shards]


def weight_axes(param: Param, plan: Plan, *, over_fsdp: bool) -> DimAxes:
    """For every dimension of a row of the table, the mesh axes (of a size above 1) that split it.

    A row without an embed axis (LoRA's B, a bias of heads) is split over fsdp along its first axis that is not
    `rank`, behind tensor, where the size allows it; else it is whole over fsdp.
    """
    dims = [WEIGHT_AXES.get(axis) for axis in param.axes]
    found: list[tuple[str, ...]] = [(axis,) if axis == "tensor" and plan.tensor > 1 else () for axis in dims]
    if over_fsdp and plan.fsdp > 1:
        home = _fsdp_dim(param, plan)
        if home is not None:
            found[home] = (*found[home], "fsdp")
    return tuple(found)


def _fsdp_dim(param: Param, plan: Plan) -> int | None:
    """The dimension that fsdp splits."""
    if "embed" in param.axes:
        return param.axes.index("embed")
    for dim, axis in enumerate(param.axes):
        parts = plan.fsdp * (plan.tensor if WEIGHT_AXES.get(axis) == "tensor" else 1)
        if axis != "rank" and param.shape[dim] % parts == 0:
            return dim
    return None


def local_size(param: Param, plan: Plan, *, over_fsdp: bool) -> int:
    """How many elements of a row one device of the mesh holds."""
    size = param.size
    for axes in weight_axes(param, plan, over_fsdp=over_fsdp):
        for axis in axes:
            size //= getattr(plan, axis)
    return size


def check_supported(plan: Plan, policy: Policy, backend: Backend) -> None:
    """The support matrix: refuse, in one line with the nearest plan that works, what a backend cannot do."""
    if plan.pipe == 1 and plan.microbatches > 1:
        raise PlanError(
            f"plan.microbatches={plan.microbatches}: there is no pipeline with plan.pipe=1; "
            "use plan.pipe=2 or more, or plan.microbatches=1"
        )
    if plan.shards != "nothing" and plan.fsdp == 1:
        way_out = f"use plan.fsdp={plan.data} plan.data=1" if plan.data > 1 else "use plan.shards=nothing"
        raise PlanError(f"plan.shards={plan.shards}: nothing to split over with plan.fsdp=1; {way_out}")
    if backend == "jax":
        return
    if plan.pipe > 1:
        _check_deepspeed_pipeline(plan, policy)
    if policy == "fp64" and plan.shards != "nothing":
        raise PlanError(
            f"plan.shards={plan.shards} with precision.policy=fp64: DeepSpeed has no float64; use plan.shards=nothing, "
            "precision.policy=fp32, or the jax backend"
        )
    if policy == "bf16" and plan.shards == "nothing" and plan.replicas > 1:
        raise PlanError(
            "plan.shards=nothing with precision.policy=bf16: DeepSpeed's stage 0 makes a hidden first update; "
            f"use plan.fsdp={plan.replicas} plan.data=1 plan.shards=optimizer"
        )


def _check_deepspeed_pipeline(plan: Plan, policy: Policy) -> None:
    """DeepSpeed's pipeline has one schedule, no float64, and no ZeRO stage but 1 that clips by the whole norm."""
    if policy == "fp64":
        raise PlanError(
            f"plan.pipe={plan.pipe} with precision.policy=fp64: DeepSpeed has no float64; use precision.policy=fp32 "
            "(parity check: --precision fp32), plan.pipe=1 plan.microbatches=1, or the jax backend"
        )
    if plan.schedule != "1f1b":
        raise PlanError(
            f"plan.schedule={plan.schedule}: DeepSpeed's pipeline runs 1f1b; use plan.schedule=1f1b, "
            "or the jax backend"
        )
    if plan.shards in ("gradients", "params"):
        raise PlanError(
            f"plan.shards={plan.shards} with plan.pipe={plan.pipe}: DeepSpeed's pipeline takes no ZeRO stage above 1; "
            f"use plan.shards=optimizer, or plan.pipe=1 plan.microbatches=1 "
            f"plan.fsdp={plan.fsdp * plan.pipe}"
        )
    if plan.shards == "nothing" and plan.replicas > 1:
        raise PlanError(
            f"plan.shards=nothing with plan.pipe={plan.pipe}: DeepSpeed's stage 0 leaves the later stages out of the norm "
            f"that it clips by; use plan.fsdp={plan.replicas} plan.data=1 plan.shards=optimizer"
        )


def check_fits(
    plan: Plan, model: ModelSpec, *, global_examples: int, accumulation: int, backend: Backend
) -> None:
    """Refuse a plan that does not divide the model or the batch, in one line with sizes that would."""
    for name in ("heads", "kv_heads", "mlp", "vocab"):
        size = getattr(model, name)
        if size % plan.tensor:
            raise PlanError(
                f"plan.tensor={plan.tensor} cannot split {name}={size} of {model.name}; {_choose('tensor', model)}"
            )
    # DeepSpeed cuts a flat buffer and pads it; a mesh axis has to divide the dimension.
    if backend == "jax" and plan.shards != "nothing" and model.embed % plan.fsdp:
        raise PlanError(
            f"plan.fsdp={plan.fsdp} cannot split embed={model.embed} of {model.name}; "
            f"use a divisor of {model.embed}, or plan.data"
        )
    _check_stages(plan, model)
    parts = accumulation * plan.microbatches * plan.replicas
    if global_examples % parts:
        microbatches = f" × plan.microbatches={plan.microbatches}" if plan.microbatches > 1 else ""
        raise PlanError(
            f"batch.global_examples={global_examples} cannot be split into {parts} equal parts "
            f"(batch.accumulation={accumulation}{microbatches} × plan.data={plan.data} × plan.fsdp={plan.fsdp}); "
            f"use batch.global_examples={parts * -(-global_examples // parts)}"
            f"{', or fewer plan.microbatches' if microbatches else ''}"
        )


def _check_stages(plan: Plan, model: ModelSpec) -> None:
    pieces, layers = plan.pipe * plan.pieces, model.layers
    if pieces > layers:
        fewer = layers // plan.pipe
        if plan.pieces == 1:
            way_out = f"plan.pipe can be at most {layers}"
        elif fewer == 0:
            way_out = f"plan.pipe × plan.chunks can be at most {layers}"
        else:
            way_out = f"use plan.chunks={fewer}" if fewer > 1 else "use plan.schedule=1f1b"
        held = f" × plan.chunks={plan.chunks}" if plan.pieces > 1 else ""
        raise PlanError(
            f"plan.pipe={plan.pipe}{held} cuts {model.name}, which has {layers} layers, into {pieces} pieces; {way_out}"
        )
    # A stage comes back to a group of microbatches as soon as the last stage is through with it.
    if plan.pieces > 1 and plan.microbatches % plan.pipe:
        fits = plan.pipe * -(-plan.microbatches // plan.pipe)
        raise PlanError(
            f"plan.schedule=interleaved takes microbatches in groups of plan.pipe={plan.pipe}, not "
            f"{plan.microbatches}; use plan.microbatches={fits}"
        )


def _choose(axis: str, model: ModelSpec) -> str:
    sizes = (model.heads, model.kv_heads, model.mlp, model.vocab)
    fits = [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
    return f"plan.{axis} can be {', '.join(map(str, fits))}"
