"""Batches on the devices: sharded over the replicas, with accumulation slices and microbatches in front."""

# A accumulation slices, M microbatches, B examples, S sequence

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxtrain.sharding import Shardings
from jaxtrain.weights import Arrays, is_stacked
from trainspec.data import Batch
from trainspec.recipe import Recipe


@dataclass(frozen=True)
class FedBatch(Batch):
    """A batch whose `slices` are on the devices, or on their way."""

    slices: Arrays


class Feeder:
    """Puts host arrays, which every process has whole, on the devices as the programs of one recipe take them."""

    def __init__(self, recipe: Recipe, shardings: Shardings) -> None:
        self._recipe, self._shardings = recipe, shardings

    def feed(self, batch: Batch) -> Arrays:
        """The arrays of a batch, [B, S]; in a pipeline with microbatches in front, [M, B, S]."""
        return self._fed((batch,), self._recipe.plan.microbatches_of(len(batch.rows)), leading=())

    def ahead(self, batch: Batch) -> FedBatch:
        """A batch with its `slices`."""
        return FedBatch(**vars(batch), slices=self.slices(batch))

    def slices(self, batch: Batch) -> Arrays:
        """The arrays of a batch with accumulation slices in front: [A, B, S], in a pipeline [A, M, B, S]."""
        if isinstance(batch, FedBatch):
            return batch.slices
        slices = batch.split(self._recipe.batch.accumulation)
        return self._fed(slices, self._recipe.plan.microbatches, leading=(len(slices),))

    def slice_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract values of what `slices` returns: enough to compile for."""
        batch, plan = self._recipe.batch, self._recipe.plan
        leading = (batch.accumulation,) if plan.pipe == 1 else (batch.accumulation, plan.microbatches)
        examples = (*leading, batch.global_examples // math.prod(leading))
        axes = (*("microbatch",) * len(leading), "batch")
        tokens = (*examples, self._recipe.data.sequence_tokens)
        return {
            f: self._shardings.shape(examples if f == "rows" else tokens, axes, np.int32)
            for f in Batch.__dataclass_fields__
        }

    def _fed(self, slices: Sequence[Batch], microbatches: int, *, leading: tuple[int, ...]) -> Arrays:
        leading = leading if self._recipe.plan.pipe == 1 else (*leading, microbatches)
        axes = (*("microbatch",) * len(leading), "batch")
        fed = {}
        for f in Batch.__dataclass_fields__:
            array = np.stack([getattr(batch, f) for batch in slices])
            fed[f] = self._shardings.put(array.reshape(*leading, -1, *array.shape[2:]), axes)
        return fed

    def replicated(self, array: NDArray[Any]) -> Array:
        """An array that every device has whole."""
        return self._shardings.put(array, ())

    def constants(self, values: Mapping[str, NDArray[Any]]) -> Arrays:
        """A method's constants, those of a stack on its layers' stages."""
        return {
            name: self._shardings.put(value, ("stage",) if is_stacked(name) else ())
            for name, value in values.items()
        }
