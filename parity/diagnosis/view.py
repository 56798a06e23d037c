"""What a diagnosis looks at: the first divergence with its arrays, and what surrounds it in both traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.compare import Comparison, Finding
from parity.comparison.pair import NAMES, Pair, as_float64
from parity.comparison.phases import CLIP, SCALAR_TENSORS
from parity.comparison.tolerance import UNIT
from trainspec.data import IGNORED
from trainspec.recipe import Recipe
from trainspec.trace import Trace, TraceName

Array = NDArray[Any]
TOKEN_WISE = ("activation", "activation_gradient")
# A part of a tensor is said to agree where its error is within the bound and below this share of the largest error.
QUIET = 1 / 30
# The bound of a tensor as a whole says this much of the elements: their root mean square, times the tail of a normal.
TAIL = 5.0
# How many roundings of the run's type two correct sides are apart, as shares of a tensor's norm. Seen in bf16, between JAX and torch in
# eight set-ups of a two-layer model: 0.8 in the gradient of the logits, which is the first of the backward pass; elsewhere 1.3 to 3.7
# in the median and at most 5.8.
ROUNDINGS = 4.0
# Of the points in a trace (their last component, or the last but one of an adapter's), the kind of fact that says where.
OPERATIONS: dict[str, str] = {
    "prompt": "at-virtual",
    "prefix_key": "at-virtual",
    "prefix_value": "at-virtual",
    "embedding": "at-embedding",
    "input_norm": "at-norm",
    "post_norm": "at-norm",
    "norm": "at-norm",
    "query": "at-projection",
    "key": "at-projection",
    "value": "at-projection",
    "query_norm": "at-head-norm",
    "key_norm": "at-head-norm",
    "rotated_query": "at-rotated",
    "rotated_key": "at-rotated",
    "mixed": "at-mixed",
    "attention": "at-attention",
    "gate": "at-gate",
    "up": "at-gate",
    "product": "at-product",
    "mlp": "at-mlp",
    "block": "at-block",
    "logits": "at-logits",
    "lora_A": "at-adapter",
    "lora_B": "at-adapter",
    "hidden": "at-adapter",
}


@dataclass(frozen=True)
class View:
    """A failed comparison and its traces. `counts` are what the recipe counts (accumulation, rank, ...), by name."""

    comparison: Comparison
    pair: Pair
    first: Finding
    counts: Mapping[str, float]

    @property
    def step(self) -> int:
        """The step of the first divergence; 0 for what the runs start from."""
        return self.first.location.step

    @property
    def phase(self) -> str:
        """Its phase."""
        return self.first.location.phase

    @property
    def tensor(self) -> str:
        """Its tensor or point."""
        return self.first.location.tensor

    @property
    def batch_step(self) -> int:
        """The step whose batch belongs to it."""
        return max(self.step, self.pair.first_step)

    @cached_property
    def judged(self) -> tuple[Finding, ...]:
        """The findings of its step and phase."""
        here = self.step, self.phase
        return tuple(f for f in self.comparison.findings if (f.location.step, f.location.phase) == here)

    @cached_property
    def failing(self) -> tuple[Finding, ...]:
        """Those that exceed their bounds."""
        return tuple(f for f in self.judged if not f.holds)

    def agrees(self, phase: str, tensor: str | None = None) -> bool:
        """Whether its step has findings of a phase (and tensor), and all of them hold."""
        found = [
            f
            for f in self.comparison.findings
            if (f.location.step, f.location.phase) == (self.step, phase)
            and tensor in (None, f.location.tensor)
        ]
        return bool(found) and all(f.holds for f in found)

    @cached_property
    def raw(self) -> tuple[Array | None, Array | None]:
        """Both arrays in the types of the traces; None for a side that has none."""
        if self.phase in SCALAR_TENSORS:
            left, right = self.pair.scalar(self.step, self.tensor)
            return np.asarray(left, np.float64), np.asarray(right, np.float64)
        if self.phase == CLIP:
            left, right = self.first.values or (np.nan, np.nan)
            return np.asarray(left, np.float64), np.asarray(right, np.float64)
        return self.pair.read(self.step, self.first.location.group, self.tensor)

    @cached_property
    def sides(self) -> tuple[Array, Array] | None:
        """Both arrays in float64, None unless both are there, of one shape, and finite."""
        left, right = self.raw
        if left is None or right is None or left.shape != right.shape:
            return None
        one, other = left.astype(np.float64), right.astype(np.float64)
        return (one, other) if np.isfinite(one).all() and np.isfinite(other).all() else None

    @cached_property
    def allowed(self) -> float:
        """How far rounding may move an element."""
        if self.sides is None or self.first.bound is None:
            return 0.0
        sizes = [np.abs(side).max(initial=0.0) for side in self.sides]
        if self.first.index is not None:
            return float(self.first.bound * max(sizes))
        norm = max(np.linalg.norm(side) for side in self.sides)
        return float(TAIL * self.first.bound * norm / np.sqrt(max(self.sides[0].size, 1)))

    @cached_property
    def rounding(self) -> float:
        """How far rounding may move the tensor as a whole, as a share of its norm; 0 if that is not known.

        It is a few roundings of the run's type, as the traces state it. A number by itself (a loss, a norm) has its own bound.
        """
        if self.sides is None or not self.first.bound:
            return 0.0
        if self.sides[0].size == 1:
            return float(self.first.bound)
        headers = [trace.header for trace in self.pair.traces if trace.header]
        unit = max((UNIT[header.policy] for header in headers if header.policy), default=0.0)
        is_first = (self.phase, self.tensor) == ("activation_gradient", "logits")
        return unit * (1.0 if is_first else ROUNDINGS)

    def batch(self, name: str) -> Array | None:
        """The left side's array of the batch."""
        return self.pair.read(self.batch_step, "batch", name)[0]

    def named_sides(self) -> Iterator[tuple[str, Array, Array]]:
        """(side, its array, the other's), for both; nothing unless there are two to compare."""
        if self.sides is not None:
            yield NAMES[0], self.sides[0], self.sides[1]
            yield NAMES[1], self.sides[1], self.sides[0]

    def both(self, group: str, name: str, step: int | None = None) -> tuple[Array, Array] | None:
        """Another pair of arrays of the step in float64, None unless both are there and of one shape."""
        left, right = self.pair.read(self.step if step is None else step, group, name)
        if left is None or right is None or left.shape != right.shape:
            return None
        return as_float64(left), as_float64(right)

    @cached_property
    def names(self) -> dict[str, TraceName]:
        """What the traces say of their names, by name."""
        orders = [trace.causal_order() for trace in self.pair.traces]
        return {named.name: named for order in reversed(orders) for named in order}

    def role(self, name: str) -> str | None:
        """What a weight is in the model, None if that is unknown."""
        return self.names[name].role if name in self.names else self.pair.structure.role(name)

    def layer(self, name: str) -> int | None:
        """The layer of a weight or a point, None outside of the layers or if unknown."""
        return self.names[name].layer if name in self.names else None

    def setting(self, *path: str) -> set[Any]:
        """What the headers of the two traces state under a key; empty where they state nothing."""
        found = set()
        for trace in self.pair.traces:
            stated: Any = {"plan": trace.header.plan, "method": trace.header.method} if trace.header else {}
            for key in path:
                stated = stated.get(key, {}) if isinstance(stated, Mapping) else {}
            if stated != {}:
                found.add(stated)
        return found

    def ways(self, axis: str) -> int:
        """Over how many devices an axis of the plan is split, on the side that splits it most; 1 where unknown."""
        return max((int(ways) for ways in self.setting("plan", axis)), default=1)

    @property
    def replicas(self) -> int:
        """How many groups of devices see different examples."""
        return self.ways("data") * self.ways("fsdp")

    def slices(self) -> list[Array]:
        """The examples of each accumulation slice, and of each of its microbatches, in order; one of all if there are none."""
        labels = self.batch("labels")
        if labels is None:
            return []
        parts = int(self.counts.get("accumulation", 1)) * self.ways("microbatches")
        return [part for part in np.array_split(np.arange(len(labels)), parts) if part.size]

    def rows_of_replicas(self) -> list[Array]:
        """The examples of each replica: its share of every slice."""
        labels = self.batch("labels")
        if labels is None:
            return []
        slices = np.array_split(np.arange(len(labels)), int(self.counts.get("accumulation", 1)))
        shares = [np.array_split(part, self.replicas) for part in slices]
        return [np.concatenate(of_one) for of_one in zip(*shares, strict=True)]

    def targets(self, rows: Array | None = None) -> int:
        """The number of target tokens of some examples, or of all."""
        labels = self.batch("labels")
        if labels is None:
            return 0
        return int((labels[rows if rows is not None else slice(None)] != IGNORED).sum())


def view_of(
    comparison: Comparison, traces: tuple[Trace, Trace], counts: Mapping[str, float] | None
) -> View | None:
    """The view of a comparison; None if it holds, or if it fails at a step that a side did not record."""
    first, pair = comparison.first_divergence, Pair(*traces)
    if first is None or (first.location.step and first.location.step not in pair.step_numbers):
        return None
    return View(comparison, pair, first, counts or {})


def counts_of(recipe: Recipe) -> dict[str, float]:
    """What a recipe counts, by name; a factor between two tensors may be one of these."""
    return {"accumulation": float(recipe.batch.accumulation)} | recipe.method.counts()


def operation(point: str) -> str | None:
    """The kind of fact that says where a point is; None for an unknown one."""
    return OPERATIONS.get(point.rpartition(".")[2])
