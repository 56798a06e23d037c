"""The phases of a comparison in causal order: what a run does first comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["initial", "batch", "row", "tensor", "optional", "derived"]


@dataclass(frozen=True)
class Phase:
    """One stage of an update. `backward` phases are visited from the last layer to the first, all in one pass.

    `kind` says where a trace keeps it: the starting weights, the batch, the step's row of scalars, tensors that every
    trainable weight must have, tensors that a run records on request only, or nowhere: derived from what it keeps.
    """

    name: str
    kind: Kind
    title: str
    backward: bool = False


# Tokens before loss: the count is settled by the batch. The norm after the gradients that it is made of.
INITIAL = Phase("initial", "initial", "starting weights")
STEP_PHASES = (
    Phase("batch", "batch", "batch"),
    Phase("tokens", "row", "target tokens"),
    Phase("activation", "optional", "activations"),
    Phase("loss", "row", "loss"),
    Phase("activation_gradient", "optional", "gradients of activations", backward=True),
    Phase("gradient", "tensor", "gradients", backward=True),
    Phase("grad_norm", "row", "gradient norm"),
    Phase("clip", "derived", "clip factor"),
    Phase("lr", "row", "learning rate"),
    Phase("moment1", "tensor", "first moments"),
    Phase("moment2", "tensor", "second moments"),
    Phase("update", "tensor", "updates"),
)
CLIP = "clip"
PHASES = (INITIAL, *STEP_PHASES)
TENSOR_PHASES = tuple(phase for phase in STEP_PHASES if phase.kind == "tensor")
BATCH_TENSORS = ("input_ids", "labels", "positions", "segments")
# The scalars of a step's row that each phase compares.
SCALAR_TENSORS = {
    "tokens": ("tokens",),
    "loss": ("loss_sum", "loss"),
    "grad_norm": ("grad_norm",),
    "lr": ("lr",),
}


@dataclass(frozen=True)
class Location:
    """Where in a run something is compared; `step` is 0 for the starting weights, else counts from 1."""

    step: int
    phase: str
    tensor: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, {self.tensor}"
