"""Causes of precision: numbers rounded to a coarser type somewhere, and numbers that are none."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

ACTIVATIONS = ("activation", "activation_gradient")
STATE = ("moment1", "moment2", "slot", "update", "change")
TABLE = Contract("Precision", "policy | master weights")
WIDE = "parity check RECIPE --precision fp64"

CAUSES = (
    Cause(
        name="rounded-start",
        sentence="weights are rounded to a coarser type when they are loaded",
        contract=Contract("Precision", "starts as the checkpoint's own number"),
        phases=("initial",),
        fits={"bf16-numbers": 4, "fp32-numbers": 4, "like-rounding": 1, "every-tensor": 1},
        needs=("bf16-numbers|fp32-numbers|like-rounding",),
        next=WIDE,
    ),
    Cause(
        name="softmax-precision",
        sentence="attention's softmax is computed in a coarser type",
        contract=Contract("Model", "softmax in float32"),
        phases=ACTIVATIONS,
        fits={"mix-of-bf16": 6, "like-rounding": 2, "small": 1, "first-tokens-agree": 2, "at-mixed": 1},
        needs=("like-rounding|small|mix-of-bf16", "first-tokens-agree|at-mixed", "at-mixed|at-attention"),
        next=WIDE,
        alike=("rotation-precision", "attention-scale"),
    ),
    Cause(
        name="loss-precision",
        sentence="the loss is computed from logits in a coarser type",
        contract=Contract("Precision", "rotary tables and loss f32"),
        phases=("loss", "activation_gradient"),
        fits={"loss-of-bf16": 6, "like-rounding": 2},
        needs=("loss-of-bf16|like-rounding", "logits-agree|at-logits"),
        next=WIDE,
    ),
    Cause(
        name="rounded-sum",
        sentence="gradients are summed over microbatches or devices in a coarser type",
        contract=Contract("Precision", "gradient is float32 from the product"),
        phases=("gradient", "grad_norm"),
        fits={"bf16-numbers": 4, "sums-of-bf16": 3, "like-rounding": 1, "activation-gradients-agree": 1, "every-tensor": 1},
        needs=("bf16-numbers|sums-of-bf16|like-rounding|fp32-numbers", "forward-agrees"),
        next="parity check RECIPE --set batch.accumulation=1  # with one summand nothing is left",
    ),
    Cause(
        name="rounded-values",
        sentence="what is computed here is rounded to a coarser type",
        contract=TABLE,
        phases=(*ACTIVATIONS, "gradient", *STATE),
        fits={"bf16-numbers": 4, "fp32-numbers": 3, "like-rounding": 2},
        needs=("bf16-numbers|fp32-numbers|like-rounding",),
        excluded=("first-tokens-agree",),
        next=WIDE,
        alike=("norm-epsilon", "softmax-precision"),
    ),
    Cause(
        name="rounded-state",
        sentence="the optimizer's state is kept in a coarser type",
        contract=TABLE,
        phases=(*STATE, "resume"),
        fits={"bf16-numbers": 5, "fp32-numbers": 4, "rounded-state": 5, "gradients-agree": 1},
        needs=("bf16-numbers|fp32-numbers|rounded-state",),
        next=WIDE,
        alike=("rounded-values",),
    ),
    Cause(
        name="not-finite",
        sentence="a NaN or an infinity is made here: a row without a visible key, a division by zero, an overflow",
        contract=Contract("Clip, optimizer, schedule", "not finite stops the run"),
        phases=(
            "activation", "loss", "activation_gradient", "gradient", "grad_norm", "clip", "moment1", "moment2", "slot", "update",
            "change", "initial", "resume",
        ),
        fits={"not-finite": 6},
        needs=("not-finite",),
        next="parity check RECIPE --precision fp64 --steps 1  # an overflow is gone, a division by zero is not",
    ),
)  # fmt: skip
