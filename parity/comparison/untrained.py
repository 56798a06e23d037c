"""What changes without a gradient: running statistics, target networks, counters, and frozen weights, which do not.

A change is judged like an update, on what the step adds. One rule needs no bound: what no step of one side ever changes
is frozen there, and every change on the other side is a difference, however small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import MOVEMENTS, NAMES, Pair, as_float64
from parity.comparison.phases import Location

Array = NDArray[Any]

# A target network is recognized by a change that is a multiple of its distance from a trained weight, but for this share.
FOLLOWS = 0.1
# Fewer elements than these follow any other weight by chance.
ENOUGH = 4


def untouched(pair: Pair, step: int) -> set[str]:
    """The weights that both sides recorded as having no gradient at `step`, such as one that is trained every other step."""
    left, right = (
        {key.removeprefix("change/") for key in keys if key.startswith("change/")} for keys in pair.keys(step)
    )
    trained = set().union(*(pair.names(step, group) for group in ("gradient", "update")))
    return (left & right) - trained


def frozen_on_one_side(location: Location, pair: Pair) -> str | None:
    """The reason why a change is a difference whatever its size: the other side never changes the weight."""
    if location.phase != "change":
        return None
    here = [
        side is not None and bool(np.any(side))
        for side in pair.read(location.step, "change", location.tensor)
    ]
    if here[0] == here[1]:
        return None
    moved = 0 if here[0] else 1
    if _ever_moves(pair, 1 - moved, location.tensor):
        return None
    return f"frozen in {NAMES[1 - moved]}, which never changes it; changed in {NAMES[moved]}"


def followed_weight(pair: Pair, location: Location, change: Array) -> tuple[str, float] | None:
    """The trained weight that a target network follows and the share of the way it goes; None if it follows none.

    Fitted to the left side: change = share · (weight after the update - value before).
    """
    weights = pair.weights(location.step)
    if location.tensor not in weights or change.size < ENOUGH:
        return None
    best: tuple[float, str, float] | None = None
    for name in sorted(pair.names(location.step, "update")):
        update = pair.read_side(location.step, "update", name, 0)
        if update is None or update.shape != change.shape or name not in weights:
            continue
        away = weights[name][0] + as_float64(update) - weights[location.tensor][0]
        size = float(np.sum(away * away))
        share = float(np.sum(away * change)) / size if size else 0.0
        rest = float(np.linalg.norm(change - share * away))
        if share > 0 and rest <= FOLLOWS * float(np.linalg.norm(change)) and (best is None or rest < best[0]):
            best = rest, name, share
    return best[1:] if best else None


def _ever_moves(pair: Pair, side: int, name: str) -> bool:
    """Read past the pair, whose memory is for the current step."""
    trace = pair.traces[side]
    for step in pair.step_numbers:
        keys = {f"{group}/{name}" for group in MOVEMENTS} & pair.keys(step)[side]
        if any(np.any(trace.read(step, key)) for key in keys):
            return True
    return False
