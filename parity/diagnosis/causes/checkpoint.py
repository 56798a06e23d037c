"""Causes in what a run starts from: weights as they are loaded, and the state of a resume."""

from __future__ import annotations

from parity.diagnosis.cause import Cause, Contract

NAMES = Contract("Model", "Canonical weights have Hugging Face's names")
RESUME = Contract("A resumed run", "are restored to the last bit")

CAUSES = (
    Cause(
        name="weight-layout",
        sentence="a weight is loaded in another layout: transposed, or its rows in another order",
        contract=Contract("Model", "`[out, in]` layout"),
        phases=("initial", "resume"),
        fits={"transposed": 6, "rows-moved": 5, "another-shape": 3, "one-tensor": 1},
        needs=("transposed|rows-moved|another-shape",),
        next="trainspec show RECIPE",
    ),
    Cause(
        name="weight-not-loaded",
        sentence="a weight of the file is not loaded: it is absent, zero or as it was drawn",
        contract=NAMES,
        phases=("initial",),
        fits={"missing": 2, "zero": 2, "one-tensor": 1, "every-tensor": 1},
        needs=("missing|zero|every-tensor|one-tensor",),
        excluded=(
            "transposed",
            "rows-moved",
            "bf16-numbers",
            "fp32-numbers",
            "like-rounding",
            "factor",
            "of-another-layer",
        ),
        next="trainspec show RECIPE",
        alike=("adapter-start",),
    ),
    Cause(
        name="weight-scaled",
        sentence="a weight is multiplied by a number when it is loaded",
        contract=NAMES,
        phases=("initial",),
        fits={"factor": 4},
        needs=("factor",),
        next="trainspec show RECIPE",
    ),
    Cause(
        name="resume-state",
        sentence="the run resumed from another state than it had when it stopped: an older checkpoint or shard, or a part left out",
        contract=RESUME,
        phases=("resume",),
        fits={"older-state": 5, "lost-state": 5, "one-family": 1, "resumed": 3},
        needs=("resumed",),
        excluded=("rounded-state", "transposed", "rows-moved"),
        next="parity check RECIPE --resume-at left:1  # then right:1: the side that differs restores another state",
        alike=("rounded-state",),
    ),
    Cause(
        name="resume-names",
        sentence="the checkpoint has the weights under other names, without a prefix for one, and the run resumed with its start's",
        contract=RESUME,
        phases=("resume",),
        fits={"start-state": 6, "resumed": 2},
        needs=("start-state",),
        next="parity check RECIPE --resume-at left:1  # then right:1: the side that differs does not find the weights",
        alike=("resume-state",),
    ),
    Cause(
        name="swapped-moments",
        sentence="the first and the second moment are restored in each other's place",
        contract=RESUME,
        phases=("resume",),
        fits={"other-moment": 6, "resumed": 2},
        needs=("other-moment",),
        next="parity check RECIPE --resume-at left:1  # then right:1: the side that differs mixes the moments up",
    ),
)
