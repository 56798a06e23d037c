"""Causes in the rotary embedding: frequencies, pairs, positions, and what is rotated at all."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

ROPE = Contract("Model", "RoPE: frequencies")
POINTS = ("activation", "activation_gradient")
SHORT = "parity check RECIPE --set data.sequence_tokens=16  # at short distances a wrong frequency hardly shows, a scale does"

CAUSES = (
    Cause(
        name="rotation",
        sentence="queries and keys are rotated otherwise: frequencies, pairs of features, or positions",
        contract=ROPE,
        phases=POINTS,
        fits={
            "other-pairs": 4,
            "other-frequencies": 3,
            "angle-offset": 1,
            "at-rotated": 5,
            "first-tokens-agree": 2,
            "grows": 2,
            "first-layer": 1,
        },
        needs=("first-tokens-agree|at-rotated|grows",),
        excluded=(
            "at-mixed",
            "at-norm",
            "at-mlp",
            "at-gate",
            "at-product",
            "at-embedding",
            "at-block",
            "at-logits",
            "at-projection",
            "last-tokens-agree",
            "only-padded-examples",
            "only-later-documents",
            "like-rounding",
            "at-head-norm",
            "forward-agrees",
            "not-rotated",
            "near-frequencies",
            "from-position",
        ),
        next=SHORT,
        alike=("attention-scale", "head-norm-order"),
    ),
    Cause(
        name="rotation-range",
        sentence="rotary tables are wrong from some position on: their end, or a stretch for long contexts",
        contract=Contract("Model", "Llama 3's stretch"),
        phases=POINTS,
        fits={"from-position": 3, "at-rotated": 4, "at-attention": 1},
        needs=("from-position",),
        excluded=("at-mixed", "at-mlp", "at-norm", "forward-agrees"),
        next="parity check RECIPE --set data.sequence_tokens=64  # the position named above lies in or beyond it",
        alike=("attention-window",),
    ),
    Cause(
        name="rotation-precision",
        sentence="rotary tables are computed in a coarser type, so angles are wrong far from the start",
        contract=Contract("Model", "tables in float32"),
        phases=POINTS,
        fits={
            "near-frequencies": 6,
            "like-rounding": 2,
            "grows": 3,
            "at-rotated": 3,
            "first-tokens-agree": 1,
        },
        needs=("near-frequencies|like-rounding|grows", "first-tokens-agree|at-rotated"),
        excluded=("at-mixed", "at-mlp", "at-norm", "forward-agrees", "at-head-norm"),
        next="parity check RECIPE --precision fp64  # is it still there?",
        alike=("softmax-precision", "rotation"),
    ),
    Cause(
        name="rotated-layers",
        sentence="a layer rotates queries and keys that is not to, or does not that is",
        contract=Contract("Model", "layers that do not rotate"),
        phases=POINTS,
        fits={"not-rotated": 6, "at-rotated": 3},
        needs=("not-rotated",),
        next="parity check RECIPE --set model.from=MODEL  # one whose config names other layers in no_rope_layers: the layer moves",
    ),
    Cause(
        name="virtual-positions",
        sentence="real tokens after virtual ones have other positions",
        contract=Contract("Methods", "real tokens' positions are shifted by the number of virtual tokens"),
        phases=("batch", "activation", "activation_gradient"),
        fits={"angle-offset": 4, "at-rotated": 5, "prefix": 1, "at-attention": 2},
        needs=("prefix|prompt", "at-rotated|at-attention"),
        excluded=("only-virtual", "only-padded-examples", "only-later-documents"),
        next="parity check RECIPE --set method.virtual_tokens=1  # a shift by one hardly turns anything, a mask still shows",
        alike=("virtual-mask", "prefix-layout"),
    ),
    Cause(
        name="prefix-rotation",
        sentence="the keys of the prefix are rotated",
        contract=Contract("Methods", "*not* rotated"),
        phases=POINTS,
        fits={"at-virtual": 4, "at-mixed": 2, "at-attention": 2},
        needs=("prefix", "at-virtual|at-mixed|at-attention"),
        excluded=("at-rotated", "only-padded-examples", "only-later-documents", "forward-agrees"),
        next="parity check RECIPE --set method.virtual_tokens=1  # a key at position 0 is not turned: nothing is left",
        alike=("prefix-layout", "virtual-mask"),
    ),
)
