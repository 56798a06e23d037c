"""Causes in the loss: which positions count, by what the sum is divided, and how often a microbatch counts."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

SUM = Contract("Loss and gradient", "The sum of token cross-entropies")
ONE_SLICE = "parity check RECIPE --set batch.accumulation=1"
BACKWARD = ("activation_gradient", "gradient", "loss")

CAUSES = (
    Cause(
        name="token-count",
        sentence="the loss is divided by another count: positions, or tokens without those that have no label",
        contract=SUM,
        phases=("tokens", "loss"),
        fits={"count-of-positions": 5, "count-off": 3, "batch-agrees": 1},
        needs=("count-of-positions|count-off",),
        excluded=("count-of-virtual",),
        next="parity check RECIPE --set data.packing=true  # with fewer positions that have no label the counts come closer",
    ),
    Cause(
        name="virtual-labels",
        sentence="virtual tokens count as targets",
        contract=Contract("Methods", "their labels are -100"),
        phases=("tokens", "loss"),
        fits={"count-of-virtual": 5},
        needs=("prompt", "count-of-virtual"),
        next="parity check RECIPE --set method.virtual_tokens=1",
        alike=("token-count",),
    ),
    Cause(
        name="label-shift",
        sentence="labels are shifted twice, or not at all",
        contract=Contract("Loss and gradient", "of a document is never a target"),
        phases=("loss", "activation_gradient"),
        fits={"loss-of-shift": 6, "loss-of-unshifted": 6},
        needs=("loss-of-shift|loss-of-unshifted",),
        next="trainspec data RECIPE  # shows which tokens are targets",
        alike=("loss-mask",),
    ),
    Cause(
        name="loss-mask",
        sentence="positions without a label count in the loss, or some with one do not",
        contract=Contract("Loss and gradient", "labels ≠ -100"),
        phases=("loss", "activation_gradient"),
        fits={"loss-of-every-position": 6, "loss-off": 2, "logits-agree": 1},
        needs=("loss-of-every-position|loss-off",),
        excluded=("loss-of-shift", "loss-of-unshifted", "loss-of-bf16", "loss-of-late-columns"),
        next="trainspec data RECIPE  # shows which tokens are targets",
        alike=("loss-form", "label-shift"),
    ),
    Cause(
        name="loss-form",
        sentence="the loss has another term: label smoothing, a z-loss, a cap of the logits",
        contract=SUM,
        phases=("loss", "activation_gradient"),
        fits={"loss-off": 2, "logits-agree": 1},
        needs=("loss-off|factor-by-token",),
        excluded=(
            "loss-of-shift",
            "loss-of-unshifted",
            "loss-of-bf16",
            "loss-of-late-columns",
            "loss-of-every-position",
            "like-rounding",
        ),
        next="parity check RECIPE --precision fp64 --steps 1",
        alike=("loss-mask",),
    ),
    Cause(
        name="loss-divisor",
        sentence="the gradient is divided by another count than the global number of target tokens",
        contract=Contract("Loss and gradient", "divided once by the *global* number"),
        phases=BACKWARD,
        fits={"factor": 2, "count-factor": 2, "at-logits": 2},
        needs=("factor", "at-logits|loss-off"),
        next=ONE_SLICE,
        alike=("averaged-over-ranks",),
    ),
    Cause(
        name="mean-of-means",
        sentence="each slice or replica is averaged over its own tokens, then the averages are averaged",
        contract=Contract("Loss and gradient", "Never a mean of means"),
        phases=BACKWARD,
        fits={"mean-of-slices": 6, "factor-by-slice": 2},
        needs=("mean-of-slices|factor-by-slice",),
        excluded=("slice-missing", "slice-doubled"),
        next=ONE_SLICE,
        alike=("microbatch-share",),
    ),
    Cause(
        name="microbatch-share",
        sentence="a microbatch counts twice or not at all",
        contract=Contract("Over many devices", "each one's loss is a sum"),
        phases=(*BACKWARD, "activation"),
        fits={"slice-missing": 5, "slice-doubled": 5, "accumulated": 1},
        needs=("slice-missing|slice-doubled",),
        next=ONE_SLICE,
        alike=("mean-of-means",),
    ),
    Cause(
        name="tied-gradient",
        sentence="a tied embedding has the gradient of one of its two uses",
        contract=Contract("Over many devices", "Gradients of a tied embedding"),
        phases=("gradient",),
        fits={"only-embedding": 3, "activation-gradients-agree": 1, "stages": 1},
        needs=("tied", "only-embedding"),
        next='parity check RECIPE --right "RIGHT plan.pipe=1"',
    ),
)
