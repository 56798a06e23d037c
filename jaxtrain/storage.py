"""The training state as sharded native arrays: loaded from canonical weights, and returned by canonical name."""

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
from trainspec.plans.plan import COMPUTE_DTYPE, STORED_DTYPE, StateKind
from trainspec.recipe import Precision
from trainspec.weight import WeightLike


class Storage:
    """The types and shardings of weights, masters and moments.

    Weights are stored in `stored_dtype`, computed with in `compute_dtype`, and gradients are summed in `reduce_dtype`.
    """

    def __init__(self, precision: Precision, shardings: Shardings, order: Order) -> None:
        policy = precision.policy
        self.stored_dtype, self.compute_dtype = (
            jnp.dtype(STORED_DTYPE[policy]),
            jnp.dtype(COMPUTE_DTYPE[policy]),
        )
        self.reduce_dtype = jnp.dtype(COMPUTE_DTYPE[precision.reduce])
        self._shardings, self._order = shardings, order

    def load(self, weights: Iterable[tuple[Param, WeightLike]], kind: StateKind, dtype: DTypeLike) -> Arrays:
        """Native arrays of canonical weights, sharded as that kind of state; each process reads only its devices' shards."""
        return from_canonical(weights, order=self._order, shardings=self._shardings.of[kind], dtype=dtype)

    def load_trained(self, weights: Iterable[tuple[Param, WeightLike]]) -> tuple[Arrays, Arrays]:
        """Weights to compute with, and masters: empty if they would be the same."""
        if self.stored_dtype == self.compute_dtype:
            return self.load(weights, "weights", self.stored_dtype), {}
        master = self.load(weights, "optimizer", self.stored_dtype)
        return jax.jit(self.computed)(master), master

    def shapes(
        self, entries: Sequence[Param], kind: StateKind, dtype: DTypeLike
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract values of what `load` returns: enough to compile for."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._shardings.of[kind][name])
            for name, shape in native_shapes(entries, order=self._order).items()
        }

    def canonical(self, native: Arrays, entries: Sequence[Param]) -> dict[str, NDArray[Any]]:
        """The entries of a table by canonical name, whole on the host."""
        return to_canonical(native, entries, order=self._order)

    def zero_moments(self, stored: Arrays, optimizer: optax.GradientTransformationExtraArgs) -> Moments:
        """The moments before the first update."""
        return jax.jit(lambda weights: self.sharded(optimizer.init(weights)))(stored)

    def sharded(self, moments: optax.OptState) -> Moments:
        """Moments sharded as the optimizer's state."""
        moment1, moment2 = (constrain_all(m, self._shardings.of["optimizer"]) for m in cast(Moments, moments))
        return Moments(moment1, moment2)

    def computed(self, stored: Arrays) -> Arrays:
        """The weights to compute with: cast first, then gathered, so that the narrower type is sent."""
        narrow = {name: w.astype(self.compute_dtype) for name, w in stored.items()}
        return constrain_all(
            constrain_all(narrow, self._shardings.of["optimizer"]), self._shardings.of["weights"]
        )
