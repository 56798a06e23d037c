"""What a fault is, and the set-ups in which faults show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from parity.comparison.phases import Location
from parity.runs.edit import Edit
from parity.runs.fixture import METHODS, TinySetup
from parity.runs.plans import refusal, runs_as
from trainspec.plans.plan import Backend, Plan, Policy
from trainspec.recipe import Recipe


@dataclass(frozen=True)
class Where:
    """The location where a fault must show: phase, step, and a pattern for the whole name of the tensor or point."""

    phase: str
    tensor: str
    step: int = 1

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, {self.tensor.replace(chr(92), '')}"

    def matches(self, location: Location) -> bool:
        """Whether `location` matches."""
        named = location.phase == self.phase and location.step == self.step
        return named and re.fullmatch(self.tensor, location.tensor) is not None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake made in the field, as edits of each backend's source.

    `imitates` describes it and `source` cites it. `where` is where it must show first; None means that the arithmetic is
    the same, so the check must pass in fp64, and `note` says why. `later_in` is where it may show first in a precision whose
    rounding hides that place: further on in the same update, where its share of the value is larger. `cause` is what a
    diagnosis must name (`parity.diagnosis.causes`); None for a fault that must pass. A backend without `edits` cannot have
    it (`note`). `below_bound_in` names the precisions in which rounding explains the difference: there it may pass.
    `fp64_only` names the backends whose other precisions run different code, out of the edit's reach.
    """

    name: str
    imitates: str
    source: str
    cause: str | None
    where: Where | None
    edits: Mapping[Backend, tuple[Edit, ...]] = field(hash=False)
    setup: str = "full"
    later_in: Mapping[Policy, Where] = field(default_factory=dict, hash=False)
    below_bound_in: tuple[Policy, ...] = ()
    fp64_only: tuple[Backend, ...] = ()
    note: str = ""

    def shows_in(self, precision: Policy) -> tuple[Where, ...]:
        """Where it may show first in a run of `precision`; empty if it must pass."""
        return tuple(where for where in (self.where, self.later_in.get(precision)) if where)

    def applies(self, backend: Backend, precision: Policy) -> bool:
        """Whether it can be planted in `backend` in a run of `precision`; not if that refuses the set-up's plan."""
        is_out_of_reach = precision != "fp64" and backend in self.fp64_only
        is_refused = refusal(PLANS.get(self.setup, Plan()), precision, backend) is not None
        return backend in self.edits and not (is_out_of_reach or is_refused)


def at_point(point: str, *, layer: int = 0) -> Where:
    """An activation point of a layer, in the forward pass."""
    return Where("activation", re.escape(f"layers.{layer}.{point}"))


def in_every_backend(*edits: Edit) -> dict[Backend, tuple[Edit, ...]]:
    """The same edits of shared code, planted in one backend at a time."""
    return dict.fromkeys(get_args(Backend), edits)


# The recipes that make faults visible, by name. Examples are padded on the left, where a causal mask alone does not hide
# the padding.
_LEFT = {"padding_side": "left"}
SETUPS: dict[str, str] = {
    "full": "every weight is trained, two accumulation slices, examples padded on the left, with clipping and decay",
    "packed": "the same with several documents packed into an example",
    "chunked": "the same, the loss made for seven positions of each row at a time; no activations are recorded",
    "tied": "the same with a head that is the embedding",
    "bias": "the same with biases",
    "warmup": "the same with a warm-up of three updates",
    "lora": "a fresh adapter (B is zero), with dropout",
    "rslora": "the same, scaled by the root of its rank",
    "adapter": "an adapter whose B is not zero, with dropout",
    "remat": "the same, recomputed in the backward pass",
    "dora": "DoRA whose B and magnitudes are drawn, with dropout",
    "qwen3": "every weight of a Qwen3 is trained",
    "qwen2": "every weight of a Qwen2 is trained: with biases, but of attention's output",
    "mistral": "every weight of a Mistral is trained, whose window is shorter than a record",
    "smollm3": "every weight of a SmolLM3 is trained, whose second layer does not rotate",
    "glm": "every weight of a GLM is trained: half of each head rotated, gate and up in one matrix",
    "bottleneck": "bottleneck adapters, none of them zero, with gelu",
    "prompt": "three virtual tokens before the embedded ones",
    "ptuning-mlp": "the same, made by P-tuning's MLP",
    "ptuning-lstm": "the same, made by P-tuning's LSTM, with dropout",
    "prefix": "three keys and values before every layer's own",
    "prefix-projection": "the same, made by a projection",
    "tensor": "every weight and bias is trained, each layer split over two devices",
    "tensor-qwen3": "every weight of a Qwen3 is trained, each layer split over two devices",
    "tensor-adapter": "an adapter whose B is not zero, with dropout, each layer split over two devices",
    "data": "every weight is trained, the examples of each accumulation slice split over two devices",
    "data-tensor": "every weight and bias is trained, examples and layers split over two by two devices",
    "zero1": "every weight is trained, examples and the optimizer's state split over two devices",
    "pipe": "every weight is trained, two layers as two pipeline stages, four microbatches of one example each",
    "pipe-tied": "the same with a head that is the embedding",
    "pipe-deep": "the same with five layers: stages of three and two",
    "pipe-prefix": "a prefix made by a projection, in the same two stages",
    "fused-packed": "several documents packed into a row of more than one block, with a fused kernel of attention",
    "fused-prefix": "three keys and values before every layer's own, examples padded on the right, with a fused kernel of attention",
    "fused-window": "a Mistral, whose window is shorter than a record, with a fused kernel of attention",
    "resume": "every weight is trained; the run is resumed after its second step",
    "resume-adapter": "an adapter whose B is not zero, with dropout; the run is resumed after its second step",
}
# The set-ups whose attention is fused; elsewhere faults of attention are edits of its definition, which all run.
FUSED = ("fused-packed", "fused-prefix", "fused-window")
# A run of these set-ups is compared with one that is not stopped.
RESUMED = ("resume", "resume-adapter")
RESUMED_AFTER = 2
# Recording would change what these run.
UNRECORDED = ("chunked",)
_PIPE = Plan(pipe=2, microbatches=4)
PLANS: dict[str, Plan] = {
    "chunked": Plan(loss_chunk=7),
    "remat": Plan(remat="full"),
    "tensor": Plan(tensor=2),
    "tensor-qwen3": Plan(tensor=2),
    "tensor-adapter": Plan(tensor=2),
    "data": Plan(data=2),
    "data-tensor": Plan(data=2, tensor=2),
    "zero1": Plan(fsdp=2, shards="optimizer"),
    "pipe": _PIPE,
    "pipe-tied": _PIPE,
    "pipe-deep": _PIPE,
    "pipe-prefix": _PIPE,
}
_VARIANTS = {
    "tied": "tied",
    "bias": "bias",
    "tensor": "bias",
    "qwen3": "qwen3",
    "tensor-qwen3": "qwen3",
    "data-tensor": "bias",
    "qwen2": "qwen2",
    "mistral": "mistral",
    "smollm3": "smollm3",
    "glm": "glm",
    "pipe-tied": "tied",
    "pipe-deep": "deep",
    "fused-window": "mistral",
}


def setup_recipe(tiny: TinySetup, setup: str, precision: Policy, backend: Backend) -> Recipe:
    """The recipe that a backend trains in a set-up of `SETUPS`; on one device if it refuses the plan."""
    attention = "fused" if setup in FUSED else "reference"
    plan = runs_as(PLANS.get(setup, Plan()), precision, backend)
    sections: dict[str, Mapping[str, Any]] = {
        "data": _LEFT,
        "precision": {"policy": precision},
        "plan": plan.model_dump() | {"attention": attention},
    }
    match setup:
        case (
            "full" | "tied" | "bias" | "qwen3" | "tensor" | "tensor-qwen3" | "data" | "data-tensor" | "zero1"
        ):
            pass
        case "chunked" | "qwen2" | "mistral" | "smollm3" | "glm" | "fused-window":
            pass
        case "fused-packed":
            sections["data"] = {"packing": True, "sequence_tokens": 200}
        case "fused-prefix":
            sections |= {"method": tiny.method("prefix"), "data": {"padding_side": "right"}}
        case "resume" | "resume-adapter":
            # A checkpoint after each step: the one before the newest is there, too.
            sections["checkpoint"] = {"every_steps": 1, "keep": 9}
            if setup == "resume-adapter":
                sections["method"] = tiny.method("lora")
        case "pipe" | "pipe-tied" | "pipe-deep":
            sections["batch"] = {"accumulation": 1}  # the pipeline's microbatches are the only ones
        case "pipe-prefix":
            sections |= {"batch": {"accumulation": 1}, "method": tiny.method("prefix-projection")}
        case "packed":
            sections["data"] = {"packing": True, "sequence_tokens": 80}
        case "warmup":
            sections["schedule"] = {"kind": "cosine", "warmup_steps": 3}
        case "lora":
            sections["method"] = METHODS["lora"].model_dump()
        case "rslora":
            sections["method"] = METHODS["lora"].model_dump() | {"rslora": True}
        case "adapter" | "remat" | "tensor-adapter":
            sections["method"] = tiny.method("lora")
        case (
            "dora" | "bottleneck" | "prompt" | "ptuning-mlp" | "ptuning-lstm" | "prefix" | "prefix-projection"
        ):
            sections["method"] = tiny.method("adapter" if setup == "bottleneck" else setup)
        case other:
            raise ValueError(f"no set-up {other!r}")
    return tiny.recipe(_VARIANTS.get(setup, "plain"), **sections)
