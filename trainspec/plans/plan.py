"""The plan: how a run is spread over devices, and how tensors are sharded. `capabilities.py` refuses what cannot be run.

All mesh axes always exist, in the order of MESH_AXES, the last one varying fastest. `data` × `fsdp` split the examples
of a batch, `fsdp` the training state that `shards` names, `tensor` the wide dimensions of every layer, `pipe` the layers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainspec.complaint import format_value
from trainspec.params import Param
from trainspec.plans.names import AttentionChoice
from trainspec.plans.names import Backend as Backend
from trainspec.plans.names import Policy as Policy

StateKind = Literal["weights", "gradients", "optimizer"]
Count = Annotated[int, Field(ge=1)]

# numpy names; see docs/numerics.md. Trained weights (the masters) and the optimizer's moments are stored in this type;
STORED_DTYPE: dict[Policy, str] = {"fp64": "float64", "fp32": "float32", "bf16": "float32"}
# the forward pass computes, frozen weights are stored, and `precision.reduce` sums gradients in this one.
COMPUTE_DTYPE: dict[Policy, str] = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}

MESH_AXES = ("pipe", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# As many logits the loss makes at once where the plan leaves it open: 256 MiB in float32.
AUTO_LOGITS = 64 * 2**20
# Logical axis of a weight -> mesh axis; one that is not listed (rank) is replicated.
WEIGHT_AXES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "gate_up": "tensor",
    "vocab": "tensor",
}
# Logical axis of several parts one after the other -> their number. What one device computes with is its share of each.
PARTS = {"gate_up": 2}
# Logical axis of an activation -> mesh axes.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "stage": ("pipe",),
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "gate_up": ("tensor",),
    "vocab": ("tensor",),
}
# What each setting of `shards` splits over fsdp: ZeRO's stages 0 to 3 (arXiv 1910.02054).
SPLIT: dict[str, tuple[StateKind, ...]] = {
    "nothing": (),
    "optimizer": ("optimizer",),
    "gradients": ("optimizer", "gradients"),
    "params": ("optimizer", "gradients", "weights"),
}
DimAxes = tuple[tuple[str, ...], ...]


class Plan(BaseModel):
    """How a run is spread over devices: mesh sizes, sharding (ZeRO 0 to 3), the pipeline and rematerialization."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
    pipe: Count = 1
    """Pipeline stages."""
    data: Count = 1
    """Replicas that split a batch, each with the training state."""
    fsdp: Count = 1
    """Devices that split a batch and shard what `shards` names."""
    tensor: Count = 1
    """Devices that share every layer: attention heads, the MLP's width and the vocabulary."""
    shards: Literal["nothing", "optimizer", "gradients", "params"] = "nothing"
    """The training state that is sharded over `fsdp`: ZeRO's stages 0 to 3, each with those before it."""
    microbatches: Count = 1
    """Into how many microbatches a pipeline cuts an accumulation slice."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """The order of a pipeline's forward and backward passes."""
    chunks: Count = 2
    """Model chunks per stage, of the schedule `interleaved`."""
    remat: Literal["none", "full"] = "none"
    """Whether the backward pass recomputes the activations of each layer instead of keeping them."""
    attention: AttentionChoice = "auto"
    """How attention is computed: `reference` is the definition, with all scores [S, S] in memory, `fused` a kernel that keeps
    none of them. `auto` is `fused` where the device and the precision have such a kernel, and `reference` in fp64."""
    loss_chunk: Literal["auto"] | Count = "auto"
    """For how many positions of each row the loss makes logits at once; `auto` takes as many as make 64 Mi logits on a
    device in one forward pass, and all of them where they are no more (`positions_at_once`)."""

    @field_validator("loss_chunk", mode="before")
    @classmethod
    def _positions(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"{format_value(value)} is no number of positions; write auto, or 1 or more")

    @property
    def devices(self) -> int:
        """How many devices the plan needs."""
        return self.pipe * self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> int:
        """How many groups of devices see different examples."""
        return self.data * self.fsdp

    @property
    def chunks_per_stage(self) -> int:
        """How many model chunks a stage holds: 1 but under `interleaved`."""
        return self.chunks if self.schedule == "interleaved" and self.pipe > 1 else 1

    def microbatches_of(self, examples: int) -> int:
        """How many microbatches a batch of evaluation makes: one where its examples do not divide."""
        return self.microbatches if examples % (self.microbatches * self.replicas) == 0 else 1

    def positions_at_once(self, rows: int, positions: int, vocab: int) -> int:
        """For how many of a row's `positions` the loss makes logits at once, where a pass of one replica has `rows` rows.

        `auto` cuts a row into the fewest chunks of equal length whose logits, rows × chunk × vocab / tensor on each device,
        are at most AUTO_LOGITS. All positions at once is the plain loss.
        """
        if self.loss_chunk != "auto":
            return min(self.loss_chunk, positions)
        most = max(1, AUTO_LOGITS * self.tensor // (rows * vocab))
        return math.ceil(positions / math.ceil(positions / most))

    def splits(self, kind: StateKind) -> bool:
        """Whether that kind of training state is sharded over fsdp."""
        return self.fsdp > 1 and kind in SPLIT[self.shards]


def weight_axes(param: Param, plan: Plan, *, over_fsdp: bool) -> DimAxes:
    """For each dimension of a weight, the mesh axes of a size above 1 that split it.

    A weight without an embed axis (LoRA's B, a bias of heads) shards over fsdp on its first dimension that is not `rank`,
    if divisible (after tensor); otherwise it is replicated over fsdp.
    """
    mapped = [WEIGHT_AXES.get(axis) for axis in param.axes]
    dims: list[tuple[str, ...]] = [(axis,) if axis == "tensor" and plan.tensor > 1 else () for axis in mapped]
    if over_fsdp and plan.fsdp > 1:
        dim = _fsdp_dim(param, plan)
        if dim is not None:
            dims[dim] = (*dims[dim], "fsdp")
    return tuple(dims)


def _fsdp_dim(param: Param, plan: Plan) -> int | None:
    """The dimension that fsdp splits; None where it splits none."""
    if "embed" in param.axes:
        return param.axes.index("embed")
    for dim, axis in enumerate(param.axes):
        shards = plan.fsdp * (plan.tensor if WEIGHT_AXES.get(axis) == "tensor" else 1)
        if axis != "rank" and param.shape[dim] % shards == 0:
            return dim
    return None


def local_size(param: Param, plan: Plan, *, over_fsdp: bool) -> int:
    """How many elements of a weight one device holds."""
    size = param.size
    for axes in weight_axes(param, plan, over_fsdp=over_fsdp):
        for axis in axes:
            size //= getattr(plan, axis)
    return size
