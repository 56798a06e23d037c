"""What only one of two traces has recorded, where that is no failure: it is named."""

from __future__ import annotations

from collections.abc import Iterator

from parity.comparison.pair import Pair
from parity.comparison.phases import STEP_PHASES

MOST_NAMES = 3


def recorded(pair: Pair, step: int, group: str) -> tuple[set[str], set[str]]:
    """What left and right have under `group/` at a step."""
    prefix = f"{group}/"
    left, right = (
        {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} for keys in pair.keys(step)
    )
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
        alone: dict[str, dict[int, set[str]]] = {"left": {}, "right": {}}
        for step in pair.step_numbers:
            left, right = recorded(pair, step, phase.name)
            alone["left"] |= {step: left - right} if left - right else {}
            alone["right"] |= {step: right - left} if right - left else {}
        for side, steps in alone.items():
            if steps:
                (first, names), count = next(iter(steps.items())), len(steps)
                some = ", ".join(pair.structure.in_order(names, backward=False)[:MOST_NAMES])
                some += f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
                at = f"step {first}" if count == 1 else f"{count} steps from {first} on"
                yield f"{phase.title} ({some}) are in {side} only at {at}: they are not compared"
