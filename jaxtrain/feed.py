"""Batches on the devices: their examples split over the replicas, slices and microbatches in front."""

# A accumulation slices, M microbatches, B examples, S sequence

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxtrain.sharding import Shardings
from jaxtrain.weights import Arrays, is_stacked
from trainspec.data import Batch
from trainspec.recipe import Recipe


class Feeder:
    """Puts host arrays, which every process has whole, where the programs of one recipe take them."""

    def __init__(self, recipe: Recipe, shardings: Shardings) -> None:
        self._recipe, self._shardings = recipe, shardings

    def feed(self, batch: Batch) -> Arrays:
        """The arrays of a batch, its examples split over the replicas; in a pipeline with the microbatches in front."""
        return self._fed((batch,), self._recipe.plan.microbatches_of(len(batch.rows)), front=())

    def parts(self, batch: Batch) -> Arrays:
        """The same with the accumulation slices in front: [A, B, S], in a pipeline [A, M, B, S]."""
        parts = batch.split(self._recipe.batch.accumulation)
        return self._fed(parts, self._recipe.plan.microbatches, front=(len(parts),))

    def part_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `parts` would give, without the numbers: enough to compile for."""
        batch, plan = self._recipe.batch, self._recipe.plan
        front = (batch.accumulation,) if plan.pipe == 1 else (batch.accumulation, plan.microbatches)
        examples = (*front, batch.global_examples // math.prod(front))
        axes = (*("microbatch",) * len(front), "batch")
        tokens = (*examples, self._recipe.data.sequence_tokens)
        return {
            f: self._shardings.shape(examples if f == "rows" else tokens, axes, np.int32)
            for f in Batch.__dataclass_fields__
        }

    def _fed(self, parts: Sequence[Batch], microbatches: int, *, front: tuple[int, ...]) -> Arrays:
        front = front if self._recipe.plan.pipe == 1 else (*front, microbatches)
        axes = (*("microbatch",) * len(front), "batch")
        fed = {}
        for f in Batch.__dataclass_fields__:
            array = np.stack([getattr(part, f) for part in parts])
            fed[f] = self._shardings.put(array.reshape(*front, -1, *array.shape[2:]), axes)
        return fed

    def constants(self, values: Mapping[str, NDArray[Any]]) -> Arrays:
        """A method's constants, those of a stack where its layers are."""
        return {
            name: self._shardings.put(value, ("stage",) if is_stacked(name) else ())
            for name, value in values.items()
        }
