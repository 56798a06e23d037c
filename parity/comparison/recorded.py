"""What only one of two traces has recorded, where that is no failure: it is named."""

from __future__ import annotations

from collections.abc import Iterator

from parity.comparison.pair import Pair
from parity.comparison.phases import STEP_PHASES


def recorded(pair: Pair, step: int, group: str) -> tuple[bool, bool]:
    """Whether left and right have anything under `group/` at a step."""
    left, right = (any(key.startswith(f"{group}/") for key in keys) for keys in pair.keys(step))
    return left, right


def one_sided(pair: Pair) -> Iterator[str]:
    """A note for each optional phase that one side alone recorded at some step, and if no side recorded a slot."""
    if pair.common_steps and not any(
        pair.names(pair.first_step, phase.name) for phase in STEP_PHASES if phase.kind == "slot"
    ):
        yield "neither trace has the optimizer's state: a difference in it shows in the updates alone"
    for phase in STEP_PHASES:
        if phase.kind != "optional":
            continue
        steps = {"left": [], "right": []}
        for step in pair.step_numbers:
            left, right = recorded(pair, step, phase.name)
            if left != right:
                steps["left" if left else "right"].append(step)
        for side, alone in steps.items():
            if alone:
                some = ", ".join(sorted(pair.names(alone[0], phase.name))[:3])
                at = f"step {alone[0]}" if len(alone) == 1 else f"{len(alone)} steps from {alone[0]} on"
                yield f"{phase.title} ({some}) are in {side} only at {at}: they are not compared"
