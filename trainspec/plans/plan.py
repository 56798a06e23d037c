"""The plan: over which devices a run is spread, and which rule splits what. `capabilities.py` refuses what cannot be run.

Mesh axes are always all there, in the order of MESH_AXES, the last one fastest. `data` × `fsdp` split the rows of a
batch, `fsdp` what `shards` names of the training state, `tensor` the wide dimensions of every layer, `pipe` the layers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainspec.params import Param

# The names of `trainspec.backends.BACKENDS`.
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
    `rank`, after tensor, where the size allows it; else it is whole over fsdp.
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
