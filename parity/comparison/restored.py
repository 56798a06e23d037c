"""What a run was restored to when it resumed, held to what it had when it stopped.

A joined trace has both: the weights and moments that the second part started with, and those after the last step of the
first part. Nothing is computed between the two, so the moments and the frozen weights are equal to the last bit. A
trained weight is not recorded after a step; it is the starting one plus the updates, each a difference of two stored
weights: rounded once in its own type, and once in float64 where it is added here.
"""

from __future__ import annotations

import numpy as np

from parity.comparison.pair import NAMES, Array, Pair
from parity.comparison.phases import RESUME, Location
from parity.comparison.tolerance import UNIT, Bound, CheckedPair

_GROUPS = ("weight", "moment1", "moment2")


def restored_tensors(pair: Pair, step: int) -> list[str]:
    """`weight/<name>`, `moment1/<name>` and `moment2/<name>` of everything that a side had, or got, before a step.

    Empty where neither side resumed.
    """
    if not (found := pair.names(step, RESUME.name)):
        return []
    wanted = {f"weight/{name}" for name in pair.names(0, "weight")}
    wanted |= {f"{group}/{name}" for group in _GROUPS[1:] for name in pair.names(step - 1, group)}
    by_group = {
        group: [key.partition("/")[2] for key in found | wanted if key.startswith(f"{group}/")]
        for group in _GROUPS
    }
    return [
        f"{group}/{name}"
        for group, names in by_group.items()
        for name in pair.structure.in_order(names, backward=False)
    ]


def restored_pairs(location: Location, pair: Pair) -> list[CheckedPair] | str:
    """Each side that resumed before the step: what it was restored to, and what it had. Why there are none, in words."""
    checked_pairs = []
    for side, name in enumerate(NAMES):
        trace = pair.traces[side]
        if not trace.resumed_names(location.step):
            continue
        restored = pair.read(location.step, RESUME.name, location.tensor)[side]
        state = _state_before(pair, side, location)
        names = f"{name} restored", f"{name} after step {location.step - 1}"
        if restored is None or state is None:
            return f"missing in {names[0 if restored is None else 1]}"
        had, bound = state
        if restored.shape != had.shape:
            return f"shape {list(restored.shape)} in {names[0]}, {list(had.shape)} in {names[1]}"
        got = restored.astype(np.float64)
        if broken := [n for n, array in zip(names, (got, had), strict=True) if not np.isfinite(array).all()]:
            return f"not finite in {' and '.join(broken)}"
        checked_pairs.append(CheckedPair(got, had, Bound(bound), names))
    return checked_pairs


def _state_before(pair: Pair, side: int, location: Location) -> tuple[Array, Array] | None:
    """What a side had after the step before, in float64, and how far rounding may move it."""
    group, _, name = location.tensor.partition("/")
    trace, steps = pair.traces[side], range(pair.first_step, location.step)
    if group != "weight":
        if location.tensor not in pair.keys(location.step - 1)[side]:
            return None
        return trace.read(steps[-1], location.tensor).astype(np.float64), np.zeros(())
    if location.tensor not in pair.keys(0)[side]:
        return None
    weight = trace.read_initial(location.tensor).astype(np.float64)
    bound = np.zeros(weight.shape)
    for step in steps:
        if f"update/{name}" in pair.keys(step)[side]:
            update = trace.read(step, f"update/{name}")
            weight = weight + update.astype(np.float64)
            stored = UNIT["fp64" if update.dtype == np.float64 else "fp32"]
            bound = bound + stored * np.abs(update) + UNIT["fp64"] * np.abs(weight)
    return weight, bound
