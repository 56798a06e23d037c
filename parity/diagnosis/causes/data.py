"""Causes in the data: which examples, which tokens, which labels, positions and documents."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

SHOWN = "trainspec data RECIPE  # shows records and examples as tokens"
UNPACKED = "parity check RECIPE --set data.packing=false  # with one document in each example nothing is left"
ORDER = Contract("Randomness", "Order of examples")
CURSOR = Contract("Randomness", "the cursor is the step")

CAUSES = (
    Cause(
        name="data-order",
        sentence="the examples come in another order: another seed, epoch or shuffle",
        contract=ORDER,
        phases=("batch",),
        fits={"same-examples": 4, "whole-examples": 3, "examples-of-another-step": 1},
        needs=("whole-examples|same-examples",),
        excluded=("a-step-off", "examples-shifted"),
        next=SHOWN,
        alike=("other-records",),
    ),
    Cause(
        name="other-records",
        sentence="the records or their tokens are others: another file, template or tokenizer",
        contract=ORDER,
        phases=("batch",),
        fits={"whole-examples": 2},
        needs=("whole-examples",),
        excluded=("same-examples", "examples-of-another-step", "a-step-off", "examples-shifted"),
        next=SHOWN,
        alike=("data-order",),
    ),
    Cause(
        name="data-cursor",
        sentence="a side reads on from another place in the data: records are read twice or left out",
        contract=CURSOR,
        phases=("batch",),
        fits={"a-step-off": 5, "examples-shifted": 5, "later-step": 1},
        needs=("a-step-off|examples-shifted",),
        excluded=("resumed",),
        next="parity check RECIPE --set batch.accumulation=1",
        alike=("data-order",),
    ),
    Cause(
        name="resume-cursor",
        sentence="a resumed run reads a batch again or leaves one out: its place in the data was not restored",
        contract=CURSOR,
        phases=("batch",),
        fits={"a-step-off": 5, "examples-shifted": 5, "examples-of-another-step": 3, "whole-examples": 1},
        needs=("resumed",),
        next="parity check RECIPE --resume-at left:1  # then right:1: the side that differs is the one whose place is lost",
        alike=("data-order",),
    ),
    Cause(
        name="labels",
        sentence="other tokens are targets: a mask, or labels that are shifted already",
        contract=Contract("Loss and gradient", "labels ≠ -100"),
        phases=("batch",),
        fits={"only-labels": 4},
        needs=("only-labels",),
        next=SHOWN,
    ),
    Cause(
        name="positions-restart",
        sentence="positions are counted otherwise: over packed documents, or over padding",
        contract=Contract("Model", "Positions restart with every document"),
        phases=("batch",),
        fits={"only-positions": 4, "packed": 1},
        needs=("only-positions",),
        next=UNPACKED,
    ),
    Cause(
        name="segments",
        sentence="documents are told apart otherwise, so other tokens may see each other",
        contract=Contract("Model", "its own document"),
        phases=("batch",),
        fits={"only-segments": 4},
        needs=("only-segments",),
        next=UNPACKED,
    ),
)
