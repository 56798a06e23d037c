"""The training state as sharded native arrays: loaded from canonical weights, and returned by canonical name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.optim import Moments
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.weights import (
    Arrays,
    Layout,
    Order,
    devices_by_shard,
    from_canonical,
    layouts,
    native_shapes,
    to_canonical,
)
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import KINDS, ArrayKind, Shard
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
        return self.with_masters(self.load_saved(weights, "weights"))

    def load_saved(self, arrays: Iterable[tuple[Param, WeightLike]], kind: ArrayKind) -> Arrays:
        """Native arrays of one kind of a checkpoint."""
        return self.load(arrays, self._state_kind(kind), self.stored_dtype)

    def with_masters(self, stored: Arrays) -> tuple[Arrays, Arrays]:
        """Weights to compute with, and masters, from trained weights as they are stored."""
        if self.stored_dtype == self.compute_dtype:
            return stored, {}
        return jax.jit(self.computed)(stored), stored

    def _state_kind(self, kind: ArrayKind) -> StateKind:
        """How an array of a checkpoint is sharded: masters as the optimizer's state."""
        has_master = self.stored_dtype != self.compute_dtype
        return "weights" if kind == "weights" and not has_master else "optimizer"

    def shapes(
        self, entries: Sequence[Param], kind: StateKind, dtype: DTypeLike
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract values of what `load` returns: enough to compile for."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._shardings.of[kind][name])
            for name, shape in native_shapes(entries, order=self._order).items()
        }

    def saved_shapes(self, entries: Sequence[Param]) -> dict[ArrayKind, dict[str, jax.ShapeDtypeStruct]]:
        """The abstract values of the arrays of a checkpoint."""
        return {kind: self.shapes(entries, self._state_kind(kind), self.stored_dtype) for kind in KINDS}

    def canonical(self, native: Arrays, entries: Sequence[Param]) -> dict[str, NDArray[Any]]:
        """The entries of a table by canonical name, whole on the host."""
        return to_canonical(native, entries, order=self._order)

    def layouts(self, entries: Sequence[Param]) -> dict[str, Layout]:
        """What each native array of a table holds."""
        return layouts(entries, order=self._order)

    def shards(
        self, native: Mapping[ArrayKind, Arrays], entries: Sequence[Param], copy: Copy
    ) -> Iterator[Shard]:
        """Copies of what this process saves, as boxes of canonical weights: of all processes together every element once.

        Nothing is sent between processes. All copies from the devices are under way before the first is waited for.
        """
        held, shapes = self.layouts(entries), {p.name: p.shape for p in entries}
        saved = self._saved(native, entries)
        for _, _, shard in saved:
            _data(shard).copy_to_host_async()
        for kind, name, shard in saved:
            index = tuple(
                slice(*s.indices(n)[:2]) for s, n in zip(shard.index, native[kind][name].shape, strict=True)
            )
            for weight, box, array in held[name].boxes(index, _copied(_data(shard), copy)):
                yield Shard(kind, weight, shapes[weight], box, array)

    def copied_bytes(self, native: Mapping[ArrayKind, Arrays], entries: Sequence[Param]) -> list[int]:
        """The size of each array that `shards` gives to `copy`, in order."""
        saved = (_data(shard) for *_, shard in self._saved(native, entries))
        return [array.nbytes for array in saved if _is_on_host(array)]

    def _saved(self, native: Mapping[ArrayKind, Arrays], entries: Sequence[Param]) -> list[Saved]:
        """What this process saves, in the order of `shards`."""
        return list(
            _saved_here(
                [(kind, name, native[kind][name]) for kind in native for name in self.layouts(entries)]
            )
        )

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


Held = tuple[ArrayKind, str, Array]
Saved = tuple[ArrayKind, str, jax.Shard]


def _saved_here(arrays: Iterable[Held]) -> Iterator[Saved]:
    """The shards that this process saves, each once: of the processes that hold one, that which has the fewest bytes so far.

    All processes come to the same result, each by itself: they see the same arrays in the same order.
    """
    saved_bytes: Counter[int] = Counter()
    for kind, name, array in sorted(arrays, key=lambda held: -held[2].nbytes):
        here = {shard.device: shard for shard in array.addressable_shards}
        holders = devices_by_shard(array.sharding.devices_indices_map(array.shape), array.shape)
        for devices in holders.values():
            device = min(devices, key=lambda device: saved_bytes[device.process_index])
            saved_bytes[device.process_index] += array.nbytes // len(holders)
            if device in here:
                yield kind, name, here[device]


def _data(shard: jax.Shard) -> Array:
    assert shard.data is not None  # JAX's type allows it, for shards of other processes
    return shard.data


def _copied(shard: Array, copy: Copy) -> NDArray[Any]:
    """A shard on the host, in memory of its own: on the cores an array of numpy would be that of the device."""
    host = np.asarray(shard)
    return copy(host) if _is_on_host(shard) else host


def _is_on_host(shard: Array) -> bool:
    (device,) = shard.devices()
    return device.platform == "cpu"
