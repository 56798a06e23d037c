"""The places of a comparison in causal order: what a run does first comes first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainspec.methods import ENCODER, PEFT_PREFIX

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
ROW_TENSORS = {
    "tokens": ("tokens",),
    "loss": ("loss_sum", "loss"),
    "grad_norm": ("grad_norm",),
    "lr": ("lr",),
}

# The order of modules within one decoder layer, as data flows; what is not listed comes last, by name.
_WITHIN_LAYER = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "query_key_value", "o_proj", "dense", "attention_adapter",
    "attention", "post_attention_layernorm", "gate_proj", "up_proj", "down_proj", "mlp_adapter", "mlp", "block",
)  # fmt: skip
# The parts of an encoder of virtual tokens, likewise; it comes before everything that sees them.
_WITHIN_ENCODER = ("embedding", "lstm_head", "mlp_head", "transform")
_LSTM_LAYER = re.compile(r"_l(\d+)(?:_reverse)?$")
# Activation points outside of the layers; the stream is made by the weights before it.
_POINTS = ("embedding", "norm", "logits")
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """Where in a run something is compared; `step` is 0 for the starting weights, else counts from 1."""

    step: int
    phase: str
    tensor: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, {self.tensor}"


def forward_key(name: str) -> tuple[int, int, int, str]:
    """Sorts canonical names and activation points as data flows: encoder, embedding, layers in order, norm, head.

    A point comes behind the weights that make it: `layers.0.mlp` behind those of `model.layers.0.mlp.down_proj`.
    """
    plain = name.removeprefix(PEFT_PREFIX)
    if plain.startswith(f"{ENCODER}."):
        part, lstm = plain.split(".")[1], _LSTM_LAYER.search(plain)
        rank = _WITHIN_ENCODER.index(part) if part in _WITHIN_ENCODER else len(_WITHIN_ENCODER)
        return -1, rank, int(lstm.group(1)) if lstm else 0, plain
    layer = _LAYER.search(plain)
    if layer:
        parts = plain[layer.end() :].split(".")
        ranks = [_WITHIN_LAYER.index(part) for part in parts if part in _WITHIN_LAYER]
        return 1, int(layer.group(1)), ranks[-1] if ranks else len(_WITHIN_LAYER), plain
    before, head = "embed" in plain or "wte" in plain, "head" in plain or "logits" in plain
    return (0 if before else 2), 0, 2 * head + (plain in _POINTS), plain


def in_order(names: set[str], *, backward: bool) -> list[str]:
    """`names` as the pass visits them: first to last layer, or the reverse."""
    return sorted(names, key=forward_key, reverse=backward)
