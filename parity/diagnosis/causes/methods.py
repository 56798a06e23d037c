"""Causes in a method: an adapter's scale, dropout, start and targets, DoRA's norm, virtual tokens and their encoder."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

POINTS = ("activation", "activation_gradient")
LORA = Contract("Methods", "LoRA: `W x + scale · B A dropout(x)`")
MASKS = Contract("Randomness", "LoRA's dropout")
NO_DROPOUT = "parity check RECIPE --set method.dropout=0"
INSIDE = "at-adapter|at-attention|at-mlp|at-projection|at-gate"

CAUSES = (
    Cause(
        name="adapter-scale",
        sentence="the low-rank product is multiplied by another number than alpha / rank (rslora: / sqrt(rank))",
        contract=Contract("Methods", "scale alpha / rank"),
        phases=POINTS,
        fits={"every-token": 3, "factor": 4},
        needs=("low-rank", "factor|at-attention|at-mlp|at-projection|at-gate"),
        excluded=(
            "first-tokens-agree",
            "zero-elements",
            "forward-agrees",
            "at-rotated",
            "at-mixed",
            "only-some-examples",
            "adapter-agrees",
        ),
        next=NO_DROPOUT,
        alike=("adapter-dropout",),
    ),
    Cause(
        name="adapter-dropout",
        sentence="dropout has other masks, or is applied elsewhere than to the adapter's input",
        contract=MASKS,
        phases=POINTS,
        fits={"every-token": 2, "zero-elements": 4, "at-adapter": 2},
        needs=("low-rank", "dropout", INSIDE),
        excluded=(
            "first-tokens-agree",
            "factor",
            "forward-agrees",
            "at-rotated",
            "at-mixed",
            "only-some-examples",
            "adapter-agrees",
        ),
        next=NO_DROPOUT,
        alike=("adapter-scale", "dropout-on-ranks"),
    ),
    Cause(
        name="recomputed-dropout",
        sentence="the recomputed forward pass draws other dropout masks",
        contract=Contract("Over many devices", "A layer that is computed again draws"),
        phases=("gradient", "activation_gradient"),
        fits={"remat": 2, "forward-agrees": 2},
        needs=("dropout", "remat", "forward-agrees"),
        next="parity check RECIPE --set plan.remat=none",
        alike=("replicated-gradient-sum",),
    ),
    Cause(
        name="adapter-start",
        sentence="an adapter starts at other values: the zero factor is the other one, or a file was not read",
        contract=Contract("Randomness", "Initial values"),
        phases=("initial",),
        fits={"zero": 3, "swapped": 3, "only-adapter": 2},
        needs=("only-adapter",),
        excluded=("missing", "transposed"),
        next="parity check RECIPE --steps 1  # then compare initial.safetensors of both traces",
        alike=("weight-not-loaded",),
    ),
    Cause(
        name="adapter-targets",
        sentence="one side adapts more modules than the other",
        contract=Contract("Methods", "What is frozen has no gradient"),
        phases=("initial",),
        fits={"missing": 3, "only-adapter": 2},
        needs=("missing", "only-adapter"),
        next="trainspec show RECIPE",
    ),
    Cause(
        name="bottleneck-adapter",
        sentence="the bottleneck adapter has another non-linearity, or sits elsewhere than before the residual sum",
        contract=Contract("Methods", "Bottleneck adapter"),
        phases=POINTS,
        fits={"every-token": 2, "at-adapter": 2},
        needs=("bottleneck", INSIDE),
        excluded=("first-tokens-agree", "only-some-examples", "forward-agrees"),
        next="parity check RECIPE --set method.kind=full  # is it in the model itself?",
    ),
    Cause(
        name="dora-norm",
        sentence="DoRA's norm is of another matrix, or its gradient is taken",
        contract=Contract("Methods", "constant of the gradient (PEFT)"),
        phases=(*POINTS, "gradient"),
        fits={"forward-agrees": 3, "every-token": 2, "dora": 2, "adapter-agrees": 2},
        needs=("dora", "forward-agrees|at-attention|at-mlp|at-adapter|at-projection|at-gate"),
        excluded=("first-tokens-agree", "zero-elements", "remat"),
        next="parity check RECIPE --set method.kind=lora  # without the norm nothing is left",
        alike=("adapter-scale", "adapter-dropout"),
    ),
    Cause(
        name="virtual-place",
        sentence="virtual tokens come in another place, or are other ones",
        contract=Contract("Methods", "virtual tokens come first"),
        phases=POINTS,
        fits={"positions-moved": 5, "only-virtual": 3, "at-embedding": 1},
        needs=("prompt|prefix", "positions-moved|only-virtual"),
        next="parity check RECIPE --set method.virtual_tokens=1",
    ),
    Cause(
        name="gradient-stopped",
        sentence="a weight that is trained gets no gradient: its branch is detached",
        contract=Contract("Methods", "What is frozen has no gradient"),
        phases=("gradient",),
        fits={"zero": 3, "forward-agrees": 1, "one-family": 1, "only-encoder": 1},
        needs=("zero",),
        excluded=("zero-block",),
        next="trainspec show RECIPE",
        alike=("tied-gradient",),
    ),
    Cause(
        name="extra-trained",
        sentence="a side trains more than the recipe says: its norm counts a gradient that the trace has not",
        contract=Contract("Methods", "What is frozen has no gradient"),
        phases=("grad_norm", "change"),
        fits={"norm-larger": 3, "frozen-changes": 4, "gradients-agree": 1},
        needs=("norm-larger|frozen-changes",),
        next="trainspec show RECIPE",
        alike=("norm-of-all",),
    ),
)
