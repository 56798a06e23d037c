"""Two traces side by side. A comparison reads through here, tensor by tensor.

What is in memory does not grow with the model: the tensors that were read last, up to `HELD_BYTES`, and the one at hand. So
those of a small model are read once; of a large one a tensor is read again where a later location needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.phases import RESUME
from parity.comparison.recent import HELD_BYTES, ArraysOnDisk, RecentArrays
from parity.comparison.structure import Structure
from trainspec.errors import TraceError
from trainspec.trace import Form, Trace

Array = NDArray[Any]
Sides = tuple[Array | None, Array | None]
# What comes before the keys of what a run was restored to.
_RESTORED = f"{RESUME.name}/"
NAMES = ("left", "right")
# The groups that say what a step adds to a weight.
MOVEMENTS = ("update", "change")


class Pair:
    """Reads left and right together. Up to `held_bytes` of what was read stay in memory, and as many of the weights."""

    def __init__(self, left: Trace, right: Trace, *, held_bytes: int = HELD_BYTES) -> None:
        self.traces = (left, right)
        if left.first_step != right.first_step:
            raise TraceError(
                f"{left.directory} starts at step {left.first_step}, {right.directory} at step {right.first_step}: only traces "
                "that start at the same step can be compared; trace both from there, or both from step 1"
            )
        self.first_step = left.first_step
        self._recent, self._newest = RecentArrays(held_bytes), 0
        self._keys: dict[int, tuple[frozenset[str], frozenset[str]]] = {}
        self._forms: dict[int, tuple[Mapping[str, Form], Mapping[str, Form]]] = {}
        self._weights, self._moved_to = ArraysOnDisk(held_bytes), dict[str, int]()
        self._sizes: dict[str, float] = {}

    @property
    def steps(self) -> tuple[int, int]:
        """How many updates each side recorded."""
        return len(self.traces[0].steps), len(self.traces[1].steps)

    @property
    def common_steps(self) -> int:
        """How many updates both sides recorded."""
        return min(self.steps)

    @property
    def step_numbers(self) -> range:
        """The steps that both sides recorded."""
        return range(self.first_step, self.first_step + self.common_steps)

    @property
    def stopped_step(self) -> int | None:
        """The step before whose update a side ended its run, if both sides have it."""
        step = self.first_step + self.common_steps
        is_stopped = any(trace.stopped and trace.stopped["step"] == step for trace in self.traces)
        return step if is_stopped and all(step in trace for trace in self.traces) else None

    @cached_property
    def structure(self) -> Structure:
        """Causal order, roles and layers of the names in the traces; an order that is only that of a recording comes last."""
        headers = {trace: trace.header.order if trace.header else None for trace in self.traces}
        surest = sorted(self.traces, key=lambda trace: headers[trace] in ("names", "recording"))
        return Structure(*(trace.causal_order() for trace in surest))

    def keys(self, step: int) -> tuple[frozenset[str], frozenset[str]]:
        """The tensor keys of each side at `step`; step 0 means what the traces start from.

        What a side was restored to before the step has the prefix `resume/`.
        """
        if step not in self._keys:
            left, right = (
                frozenset(
                    (*trace.names(step), *(f"{_RESTORED}{key}" for key in trace.resumed_names(step)))
                    if step
                    else trace.initial_names()
                )
                for trace in self.traces
            )
            self._keys[step] = left, right
        return self._keys[step]

    def names(self, step: int, group: str) -> set[str]:
        """The names that either side has under `group/`."""
        prefix = f"{group}/"
        return {
            key.removeprefix(prefix) for keys in self.keys(step) for key in keys if key.startswith(prefix)
        }

    def slots(self, step: int, name: str) -> list[str]:
        """The optimizer's slots of a weight, sorted: what comes after `slot/` in their names."""
        return sorted(slot for slot in self.names(step, "slot") if slot.partition("/")[2] == name)

    def forms(self, step: int, group: str, name: str) -> tuple[Form | None, Form | None]:
        """Type and shape of the two arrays of `group/name`, which are not read; None for a side that lacks it."""
        if step not in self._forms:
            left, right = (trace.forms(step) if step else trace.initial_forms() for trace in self.traces)
            kept = {old: forms for old, forms in self._forms.items() if old in (0, step - 1)}
            self._forms = kept | {step: (left, right)}
        left, right = (forms.get(f"{group}/{name}") for forms in self._forms[step])
        return left, right

    def read(self, step: int, group: str, name: str) -> Sides:
        """The two arrays of `group/name`, None for a side that lacks it; step 0 reads the starting weights."""
        return self.read_side(step, group, name, 0), self.read_side(step, group, name, 1)

    def read_side(self, step: int, group: str, name: str, side: int) -> Array | None:
        """The array of one side."""
        if step > self._newest:  # no later location reads what is older than the step before
            self._newest = step
            self._recent.forget(lambda old: old[0] < step - 1)
        key = f"{group}/{name}"
        return self._recent.get((step, key, side), lambda: (self._read(side, step, key),))[0]

    def scalar(self, step: int, key: str) -> tuple[float, float]:
        """A scalar of the step, of both sides. Raises TraceError if it is not a number."""
        left, right = (_number(trace, step, key) for trace in self.traces)
        return left, right

    def weights(self, step: int) -> Mapping[str, tuple[Array, Array]]:
        """Weights that the run may change, of both sides, before update `step` (float64), for the names that both have.

        Call it with ascending steps: the weights are the starting ones plus the updates so far, which each is when it is
        asked for.
        """
        return _Weights(self, step)

    @cached_property
    def moving(self) -> tuple[str, ...]:
        """The names of those weights."""
        found = set().union(*(self.names(i, group) for i in self.step_numbers for group in MOVEMENTS))
        both = {name: self.forms(0, "weight", name) for name in sorted(found)}
        return tuple(
            name for name, (left, right) in both.items() if left and right and left.shape == right.shape
        )

    def weight_before(self, step: int, name: str) -> tuple[Array, Array]:
        """A weight of `moving` before update `step`."""
        if name not in self._weights:
            left, right = (as_float64(side) for side in self.read(0, "weight", name) if side is not None)
            self._moved_to[name] = self.first_step
            self._weights.put(name, (left, right))
        left, right = self._weights.get(name)
        if self._moved_to[name] >= step:
            return left, right
        for made in range(self._moved_to[name], step):
            for group in MOVEMENTS:
                moved = self.read(made, group, name)
                left, right = _updated(left, moved[0]), _updated(right, moved[1])
        self._moved_to[name] = step
        self._weights.put(name, (left, right))
        return left, right

    def starting_size(self, name: str) -> float:
        """The Frobenius norm of a starting weight of the left side; 0 if it has no such weight."""
        if name not in self._sizes:
            weight = self.read(0, "weight", name)[0]
            self._sizes[name] = 0.0 if weight is None else float(np.linalg.norm(as_float64(weight)))
        return self._sizes[name]

    def starting_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the starting weights that either side has, the left side's first."""
        sides = {name: self.forms(0, "weight", name) for name in self.names(0, "weight")}
        return {name: next(s.shape for s in both if s is not None) for name, both in sides.items()}

    def _read(self, side: int, step: int, key: str) -> Array | None:
        if key not in self.keys(step)[side]:
            return None
        trace = self.traces[side]
        if key.startswith(_RESTORED):
            return trace.read_resumed(step, key.removeprefix(_RESTORED))
        return trace.read(step, key) if step else trace.read_initial(key)


class _Weights(Mapping[str, tuple[Array, Array]]):
    """The weights of both sides before an update, each made when it is asked for."""

    def __init__(self, pair: Pair, step: int) -> None:
        self._pair, self._step, self._names = pair, step, frozenset(pair.moving)

    def __getitem__(self, name: str) -> tuple[Array, Array]:
        if name not in self._names:
            raise KeyError(name)
        return self._pair.weight_before(self._step, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pair.moving)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def as_float64(array: Array) -> Array:
    """A float64 copy for the arithmetic of bounds. Non-finite values fail at their own location and count as zero."""
    return np.nan_to_num(array.astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _number(trace: Trace, step: int, key: str) -> float:
    value = trace.record(step)[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TraceError(
            f"{trace.directory}: step {step}: {key} is {value!r}, not a number; write the trace again"
        )
    return value


def _updated(weight: Array, update: Array | None) -> Array:
    return weight if update is None or update.shape != weight.shape else weight + as_float64(update)
