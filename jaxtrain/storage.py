"""The training state as native arrays: read from canonical weights, given back by canonical name, each where the plan says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.optim import Moments
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.weights import Arrays, Order, from_canonical, native_shapes, to_canonical
from trainspec.params import Param
from trainspec.plans.plan import COMPUTE_DTYPE, STORED_DTYPE, Part
from trainspec.recipe import Precision
from trainspec.weight import WeightLike


class Storage:
    """Where weights, masters and moments are and of what type: stored, computed with, or as gradients are summed."""

    def __init__(self, precision: Precision, shardings: Shardings, order: Order) -> None:
        policy = precision.policy
        self.stored_dtype, self.compute_dtype = (
            jnp.dtype(STORED_DTYPE[policy]),
            jnp.dtype(COMPUTE_DTYPE[policy]),
        )
        self.reduce_dtype = jnp.dtype(COMPUTE_DTYPE[precision.reduce])
        self._shardings, self._order = shardings, order

    def load(self, weights: Iterable[tuple[Param, WeightLike]], part: Part, dtype: DTypeLike) -> Arrays:
        """Native arrays of canonical weights, each device reading what it holds of that part of the state."""
        return from_canonical(weights, order=self._order, shardings=self._shardings.of[part], dtype=dtype)

    def load_trained(self, weights: Iterable[tuple[Param, WeightLike]]) -> tuple[Arrays, Arrays]:
        """What is computed with, and the masters where those are something else."""
        if self.stored_dtype == self.compute_dtype:
            return self.load(weights, "weights", self.stored_dtype), {}
        master = self.load(weights, "optimizer", self.stored_dtype)
        return jax.jit(self.computed)(master), master

    def shapes(
        self, entries: Sequence[Param], part: Part, dtype: DTypeLike
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """What `load` would give, without the numbers: enough to compile for."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._shardings.of[part][name])
            for name, shape in native_shapes(entries, order=self._order).items()
        }

    def canonical(self, native: Arrays, entries: Sequence[Param]) -> dict[str, NDArray[Any]]:
        """The entries of a table by canonical name, whole on the host."""
        return to_canonical(native, entries, order=self._order)

    def no_moments(self, stored: Arrays, optimizer: optax.GradientTransformationExtraArgs) -> Moments:
        """Zeros, where the optimizer's part of the state is."""
        return jax.jit(lambda weights: self.placed(optimizer.init(weights)))(stored)

    def placed(self, moments: optax.OptState) -> Moments:
        """Moments where the optimizer's part of the state is."""
        moment1, moment2 = (constrain_all(m, self._shardings.of["optimizer"]) for m in cast(Moments, moments))
        return Moments(moment1, moment2)

    def computed(self, stored: Arrays) -> Arrays:
        """What is computed with: cast where it lies, then gathered, so that the narrower type travels."""
        cast_ = {name: w.astype(self.compute_dtype) for name, w in stored.items()}
        return constrain_all(
            constrain_all(cast_, self._shardings.of["optimizer"]), self._shardings.of["weights"]
        )
