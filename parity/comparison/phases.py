"""The phases of a comparison, in causal order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["initial", "resume", "batch", "scalar", "tensor", "slot", "untrained", "optional", "derived"]


@dataclass(frozen=True)
class Phase:
    """A kind of quantity within an update. `backward` phases are visited together, from the last layer to the first.

    `kind` says where a trace keeps it: with the starting weights, what the run was restored to, the batch, the step's
    scalars, the tensors of every trained weight, the optimizer's state, which not every rule has, those of weights without a
    gradient, or the tensors recorded on request only. `derived`: it is computed from the others.
    """

    name: str
    kind: Kind
    title: str
    backward: bool = False


# What a trace starts from, and the group of its files that has it. Only a run that resumed starts with moments.
INITIAL = Phase("initial", "initial", "starting weights")
INITIAL_PHASES = (
    INITIAL,
    Phase("initial_moment1", "initial", "starting first moments"),
    Phase("initial_moment2", "initial", "starting second moments"),
)
INITIAL_GROUPS = {"initial": "weight", "initial_moment1": "moment1", "initial_moment2": "moment2"}
RESUME = Phase("resume", "resume", "restored state")
# Tokens come before the loss, as the batch settles their number; the norm comes after the gradients it is made of.
STEP_PHASES = (
    RESUME,
    Phase("batch", "batch", "batch"),
    Phase("tokens", "scalar", "target tokens"),
    Phase("activation", "optional", "activations"),
    Phase("loss", "scalar", "loss"),
    Phase("activation_gradient", "optional", "gradients of activations", backward=True),
    Phase("gradient", "tensor", "gradients", backward=True),
    Phase("grad_norm", "scalar", "gradient norm"),
    Phase("clip", "derived", "clip factor"),
    Phase("lr", "scalar", "learning rate"),
    Phase("moment1", "slot", "first moments"),
    Phase("moment2", "slot", "second moments"),
    Phase("slot", "slot", "optimizer state"),
    Phase("update", "tensor", "updates"),
    Phase("change", "untrained", "changes without a gradient"),
)
# What there is of a step that ended the run before its update.
STOPPED_PHASES = tuple(
    phase
    for phase in STEP_PHASES
    if phase.name
    in ("resume", "batch", "tokens", "activation", "loss", "activation_gradient", "gradient", "grad_norm")
)
RECORDED_ON_REQUEST = tuple(phase.name for phase in STEP_PHASES if phase.kind == "optional")
CLIP = "clip"
PHASES = (*INITIAL_PHASES, *STEP_PHASES)
# What a weight that is trained at a step must have; the moments, if recorded, are of such weights only.
TENSOR_PHASES = tuple(phase for phase in STEP_PHASES if phase.kind == "tensor")
WEIGHT_SHAPED = ("gradient", "moment1", "moment2", "update", "change")
BATCH_TENSORS = ("input_ids", "labels", "positions", "segments")
# The scalars of a step that each phase compares.
SCALAR_TENSORS = {
    "tokens": ("tokens",),
    "loss": ("loss_sum", "loss"),
    "grad_norm": ("grad_norm",),
    "lr": ("lr",),
}


@dataclass(frozen=True)
class Location:
    """Where in a run something is compared; `step` counts from 1, and is 0 for what a trace starts from."""

    step: int
    phase: str
    tensor: str

    @property
    def group(self) -> str:
        """The group of the trace's files that holds it."""
        return INITIAL_GROUPS.get(self.phase, self.phase)

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, {self.tensor}"
