"""What a resume restored, where it is not what the run had."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES, Array
from parity.comparison.phases import RESUME
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.loss import bf16
from parity.diagnosis.view import View

_OTHER = {"moment1": "moment2", "moment2": "moment1"}


def restored(view: View) -> Iterator[Fact]:
    """Whether a restored array is, in whole or in part, that of an earlier step, the other moment, zero, or rounded."""
    if view.phase != RESUME.name:
        return
    yield Fact("resumed", f"a side resumed just before step {view.step}")
    side = next((i for i, name in enumerate(NAMES) if view.first.names[0].startswith(name)), None)
    got = view.pair.read(view.step, RESUME.name, view.tensor)[side] if side is not None else None
    if side is None or got is None:
        return
    states = _states(view, side)
    had = states.pop(view.step - 1, None)
    if had is None or had.shape != got.shape:
        return
    array, whose = got.astype(np.float64), f"what {NAMES[side]} restored of {view.tensor}"
    near = 1e-6 * float(np.abs(had).max(initial=0.0))
    if not array.any() and had.any():
        yield Fact("lost-state", f"{whose} is zero")
    if (other := _other_moment(view, side)) is not None and had.any() and np.array_equal(array, other):
        yield Fact("other-moment", f"{whose} is what it had of the other moment")
        return
    changed = np.abs(array - had) > near
    for step, state in states.items():
        if not array.any() or state.shape != array.shape or not changed.any():
            continue
        is_all = np.abs(state - array).max() <= near
        if is_all and step == view.pair.first_step - 1:
            yield Fact("start-state", f"{whose} is what the run started with")
            return
        if is_all or np.abs(state - array)[changed].max() <= near:
            part = "" if is_all else f" in {changed.sum()} of {changed.size} elements"
            yield Fact("older-state", f"{whose} is{part} its state after step {step}")
            return
    if np.array_equal(array, bf16(had)) or np.array_equal(array, had.astype(np.float32).astype(np.float64)):
        yield Fact("rounded-state", f"{whose} is the state, rounded to a coarser type")


def _other_moment(view: View, side: int) -> Array | None:
    """The other moment of the tensor after the step before this one, if it is a moment."""
    group, _, name = view.tensor.partition("/")
    key = f"{_OTHER.get(group, group)}/{name}"
    if key == view.tensor or key not in view.pair.keys(view.step - 1)[side]:
        return None
    return view.pair.traces[side].read(view.step - 1, key).astype(np.float64)


def _states(view: View, side: int) -> dict[int, Array]:
    """What a side had after each step before this one, by step; 0 is the start."""
    group, _, name = view.tensor.partition("/")
    trace, states = view.pair.traces[side], {}
    weight = np.zeros(())
    if group == "weight":
        if view.tensor not in view.pair.keys(0)[side]:
            return {}
        weight = trace.read_initial(view.tensor).astype(np.float64)
        states[view.pair.first_step - 1] = weight
    for step in range(view.pair.first_step, view.step):
        if group != "weight" and view.tensor in view.pair.keys(step)[side]:
            states[step] = trace.read(step, view.tensor).astype(np.float64)
        elif group == "weight":
            key = f"update/{name}"
            weight = weight + trace.read(step, key) if key in view.pair.keys(step)[side] else weight
            states[step] = weight
    return states
