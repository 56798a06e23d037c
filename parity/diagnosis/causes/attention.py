"""Causes in attention: who sees whom, the scale, the softmax, and which heads share keys and values."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

POINTS = ("activation", "activation_gradient")
SEES = Contract("Model", "A query sees keys of")
# The mix of a layer, or what comes of it where no point within attention is recorded.
MIXED = "at-mixed|at-attention"
ELSEWHERE = (
    "at-rotated", "at-projection", "at-head-norm", "at-norm", "at-mlp", "at-gate", "at-product", "at-embedding", "at-block",
    "at-logits",
)  # fmt: skip

# Attention made again with a known mistake, which leaves no room for another.
MIXES = (
    "mix-of-later-keys", "mix-of-padding", "mix-of-documents", "mix-without-prefix", "mix-of-tiled-heads", "mix-of-window",
    "mix-of-scale", "mix-of-bf16", "mix-of-other-heads", "mix-without-offset",
)  # fmt: skip
OTHER_MIXES = tuple(kind for kind in MIXES if kind not in ("mix-of-tiled-heads", "mix-of-other-heads"))

CAUSES = (
    Cause(
        name="causal-mask",
        sentence="a query sees keys after it, or not its own: the causal mask is off",
        contract=Contract("Model", "its own document at or before itself"),
        phases=POINTS,
        fits={"mix-of-later-keys": 6, "mix-without-offset": 6, "last-tokens-agree": 5},
        needs=("last-tokens-agree|mix-of-later-keys|mix-without-offset", MIXED),
        excluded=ELSEWHERE,
        next="parity check RECIPE --set data.sequence_tokens=16",
    ),
    Cause(
        name="padding-mask",
        sentence="padding is seen by tokens, or hides some",
        contract=SEES,
        phases=(*POINTS, "loss"),
        fits={"mix-of-padding": 6, "only-padded-examples": 4, "only-padding": 3, "padded": 1},
        needs=(
            "only-padded-examples|only-padding|mix-of-padding|padded",
            f"only-padded-examples|only-padding|{MIXED}",
        ),
        excluded=(
            "only-later-documents",
            "forward-agrees",
            "first-tokens-agree",
            "last-tokens-agree",
            "same-everywhere",
            "small",
            *ELSEWHERE,
        ),
        next="parity check RECIPE --set data.packing=true  # without padding nothing is left",
    ),
    Cause(
        name="document-mask",
        sentence="documents packed into one example see each other, or positions do not restart",
        contract=SEES,
        phases=POINTS,
        fits={"mix-of-documents": 6, "only-later-documents": 4, "packed": 1},
        needs=("only-later-documents|mix-of-documents",),
        next="parity check RECIPE --set data.packing=false",
        alike=("positions-restart",),
    ),
    Cause(
        name="attention-window",
        sentence="a query sees only so many keys before it: a window, or a block that is left out",
        contract=SEES,
        phases=POINTS,
        fits={"mix-of-window": 6, "from-position": 4, "at-mixed": 3, "at-attention": 1},
        needs=("from-position|mix-of-window", MIXED),
        excluded=ELSEWHERE,
        next="parity check RECIPE --set data.sequence_tokens=64  # the position named above lies in or beyond it",
        alike=("rotation-range",),
    ),
    Cause(
        name="attention-scale",
        sentence="scores are multiplied by another number than 1 / sqrt(head_dim), or capped",
        contract=Contract("Model", "Attention: scale"),
        phases=POINTS,
        fits={"mix-of-scale": 6, "first-tokens-agree": 2, "at-mixed": 3},
        needs=("first-tokens-agree|mix-of-scale", MIXED),
        excluded=(
            *ELSEWHERE,
            "last-tokens-agree",
            "only-padded-examples",
            "only-later-documents",
            "like-rounding",
            "from-position",
            "prefix",
        ),
        next="parity check RECIPE --set data.sequence_tokens=16  # at short distances a wrong frequency hardly shows, a scale does",
        alike=("rotation", "softmax-precision"),
    ),
    Cause(
        name="kv-grouping",
        sentence="query heads share other kv heads: repeated where they are tiled, or the reverse",
        contract=Contract("Model", "grouped kv heads"),
        phases=POINTS,
        fits={
            "mix-of-tiled-heads": 6,
            "mix-of-other-heads": 6,
            "every-token": 1,
            "only-some-heads": 3,
            "heads-moved": 3,
            "at-mixed": 1,
        },
        needs=(MIXED, "every-token|only-some-heads|heads-moved"),
        excluded=(
            *ELSEWHERE,
            "first-tokens-agree",
            "last-tokens-agree",
            "only-padded-examples",
            "only-later-documents",
            "same-everywhere",
            "small",
            "factor",
            "prefix",
            "low-rank",
            "bottleneck",
            *OTHER_MIXES,
        ),
        next="parity check RECIPE --set model.from=MODEL  # one with as many kv heads as heads: nothing is left",
        alike=("projection",),
    ),
    Cause(
        name="head-norm-order",
        sentence="queries and keys are normed after the rotation, or not at all",
        contract=Contract("Model", "RoPE: frequencies"),
        phases=POINTS,
        fits={"at-head-norm": 4, "first-tokens-agree": 4, "at-rotated": 3},
        needs=("head-norms", "at-head-norm|at-rotated|at-mixed|at-attention"),
        excluded=("last-tokens-agree", "only-padded-examples", "only-later-documents"),
        next="parity check RECIPE --set model.from=MODEL  # one without norms of queries and keys: nothing is left",
        alike=("rotation", "attention-scale"),
    ),
    Cause(
        name="virtual-mask",
        sentence="virtual tokens are hidden from some tokens",
        contract=Contract("Methods", "every token sees all virtual ones"),
        phases=POINTS,
        fits={"mix-without-prefix": 6, "at-mixed": 3, "at-attention": 2, "every-token": 1},
        needs=("prefix|prompt", MIXED),
        excluded=("at-rotated", "at-virtual", "only-padded-examples"),
        next="parity check RECIPE --set method.virtual_tokens=1  # a shift by one hardly turns anything, a mask still shows",
        alike=("prefix-layout", "virtual-positions"),
    ),
    Cause(
        name="prefix-layout",
        sentence="the prefix is cut up otherwise: keys for values, layers or heads in another order",
        contract=Contract("Methods", "Prefix: keys and values"),
        phases=POINTS,
        fits={"at-virtual": 4, "swapped": 3, "at-mixed": 2, "at-attention": 2, "every-token": 1},
        needs=("prefix", "at-virtual|at-mixed|at-attention"),
        excluded=("at-rotated", "only-padded-examples", "forward-agrees"),
        next="parity check RECIPE --set method.virtual_tokens=1",
        alike=("virtual-mask", "virtual-positions"),
    ),
    Cause(
        name="attention-gradient",
        sentence="attention's backward pass is not that of its forward pass: a part of the softmax is taken for a constant",
        contract=Contract("Model", "softmax in float32"),
        phases=("activation_gradient",),
        fits={"at-rotated": 4, "at-virtual": 4, "at-projection": 2, "forward-agrees": 2},
        needs=("forward-agrees", "at-rotated|at-virtual|at-projection|at-head-norm"),
        excluded=("factor", "agrees-further-back", "slice-missing", "factor-by-slice"),
        next="parity check RECIPE --set plan.remat=none  # then attention without a fused kernel",
        alike=("recomputed-dropout",),
    ),
)
