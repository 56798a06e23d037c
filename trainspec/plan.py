"""The plan: over which devices a run is spread, and what each backend can do of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainspec.errors import PlanError

Backend = Literal["jax", "torch"]
Policy = Literal["fp64", "fp32", "bf16"]
Count = Annotated[int, Field(ge=1)]

# What a trained weight and the optimizer's moments are stored in (numpy names); see docs/numerics.md.
STORED_DTYPE: dict[Policy, str] = {"fp64": "float64", "fp32": "float32", "bf16": "float32"}
MESH_AXES = ("pipe", "data", "fsdp", "tensor")


class Plan(BaseModel):
    """Mesh sizes, what is sharded over `fsdp` (ZeRO 0 to 3 in neutral words), and what is recomputed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    pipe: Count = 1
    data: Count = 1
    fsdp: Count = 1
    tensor: Count = 1
    shards: Literal["nothing", "optimizer", "gradients", "params"] = "nothing"
    microbatches: Count = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    remat: Literal["none", "full"] = "none"

    @property
    def devices(self) -> int:
        """How many devices the plan takes."""
        return self.pipe * self.data * self.fsdp * self.tensor


def check_supported(plan: Plan, policy: Policy, backend: Backend) -> None:
    """The support matrix: refuse, in one line with the nearest plan that works, what a backend cannot do."""
    for axis in MESH_AXES:
        size = getattr(plan, axis)
        if size != 1:
            raise PlanError(f"plan.{axis}={size}: {backend} trains on one device so far; use plan.{axis}=1")
    for field, only in (("shards", "nothing"), ("microbatches", 1)):
        if getattr(plan, field) != only:
            raise PlanError(
                f"plan.{field}={getattr(plan, field)}: nothing to spread on one device; use plan.{field}={only}"
            )
    if policy == "bf16":
        raise PlanError(
            f"precision.policy=bf16: {backend} trains in fp32 and fp64 so far; use precision.policy=fp32"
        )
