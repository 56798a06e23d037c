"""A weight in use: gathered where it is needed, its gradient summed in the type and to the place it belongs.

A product with a weight keeps the *shard* for its backward pass, never the gathered weight: under `shards: params` a
layer's weights are whole only while that layer computes, and are gathered once more on the way back.
The gradient leaves through `slot`, which has the type of `precision.reduce`: products of bfloat16 numbers are summed
in float32 where the recipe asks for it, over tokens and over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

Constrain = Callable[[Array, tuple[str, ...]], Array]
_Operation = Callable[["Place", Array, Array, Array | None, Array | None], Array]


@dataclass(frozen=True)
class Place:
    """Where a weight is while it is used, and whether it is split further while it is not; where its gradient is
    left (None where it is frozen), in which type."""

    in_use: NamedSharding
    is_split: bool
    gradient: NamedSharding | None
    dtype: np.dtype


@partial(jax.tree_util.register_dataclass, data_fields=("value", "slot", "piece"), meta_fields=("place",))
@dataclass(frozen=True)
class Weight:
    """A weight of the model: `value` as it is stored, `slot` what it is differentiated by, None where frozen.

    `slot` has the shape of `value` and the type of the gradient; its value is never read. Under a scan all have
    layers in front, `place` is that of one layer. Where a stage of a pipeline has several pieces of the model, value and
    slot have the pieces in front, and `piece` says which one is used.
    """

    value: Array
    slot: Array | None
    piece: Array | None
    place: Place


def matmul(x: Array, weight: Weight) -> Array:
    """x [..., in] times W [in, out]."""
    return _matmul(weight.place, x, weight.value, weight.slot, weight.piece)


def matmul_transposed(x: Array, weight: Weight) -> Array:
    """x [..., in] times the transpose of W [out, in]: the tied head."""
    return _matmul_transposed(weight.place, x, weight.value, weight.slot, weight.piece)


def scale(x: Array, weight: Weight) -> Array:
    """w * x, w [features]."""
    return _scale(weight.place, x, weight.value, weight.slot, weight.piece)


def shift(x: Array, weight: Weight) -> Array:
    """x + b, b [features]."""
    return _shift(weight.place, x, weight.value, weight.slot, weight.piece)


def lookup(ids: Array, weight: Weight) -> Array:
    """Rows `ids` [...] of W [rows, features]."""
    return _lookup(weight.place, ids, weight.value, weight.slot, weight.piece)


def read(weight: Weight) -> Array:
    """The weight itself, whole, in the type of its gradient: what is made of it is summed in that."""
    like = jnp.zeros((), weight.place.dtype)
    return _read(weight.place, like, weight.value, weight.slot, weight.piece)


def _operation(
    forward: Callable[[Array, Array], Array],
    input_gradient: Callable[[Array, Array], Array | None],
    weight_gradient: Callable[[Array, Array, Array, DTypeLike], Array],
) -> _Operation:
    """forward(x, w) with w gathered; its gradients from (dy, w) and (dy, x, w's shard, type)."""

    def keep(
        place: Place, x: Array, value: Array, slot: Array | None, piece: Array | None
    ) -> tuple[Array, tuple[Array, Array, Array | None]]:
        return forward(x, _whole(chosen(value, piece), x, place)), (x, value, piece)

    def pull(
        place: Place, kept: tuple[Array, Array, Array | None], dy: Array
    ) -> tuple[Array | None, None, Array | None, None]:
        x, pieces, piece = kept
        value, by_weight = chosen(pieces, piece), None
        if place.gradient is not None:
            by_weight = weight_gradient(dy, x, value, place.dtype)
            # First as the weight is used, then split: going straight there, the partitioner moves activations instead.
            by_weight = lax.with_sharding_constraint(by_weight, place.in_use)
            by_weight = lax.with_sharding_constraint(by_weight, place.gradient)
            by_weight = _among(by_weight, piece, len(pieces))
        return input_gradient(dy, _whole(value, dy, place)), None, by_weight, None

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def apply(place: Place, x: Array, value: Array, slot: Array | None, piece: Array | None) -> Array:
        return keep(place, x, value, slot, piece)[0]

    apply.defvjp(keep, pull)
    return cast(_Operation, apply)


def chosen(pieces: Array, piece: Array | None) -> Array:
    """The piece in use. Selected, not indexed: each stage uses another one, and indexing would be sending."""
    return pieces if piece is None else lax.select_n(piece, *pieces)


def _among(gradient: Array, piece: Array | None, pieces: int) -> Array:
    """A gradient in its piece's place among zeros."""
    if piece is None:
        return gradient
    return jnp.stack([jnp.where(piece == i, gradient, 0) for i in range(pieces)])


def _whole(value: Array, beside: Array, place: Place) -> Array:
    """A weight gathered over fsdp, at the time that `beside` is there.

    Without the barrier the compiler sees that every microbatch gathers the same head, or the backward pass what the
    forward pass did, and keeps the gathered weight all the while.
    """
    if place.is_split:
        value, _ = lax.optimization_barrier((value, beside))
    return lax.with_sharding_constraint(value, place.in_use)


def _sum_of_products(left: Array, right: Array, dtype: DTypeLike) -> Array:
    """left [..., m] and right [..., n] contracted over everything in front: [m, n], summed in `dtype`."""
    front = tuple(range(left.ndim - 1))
    return lax.dot_general(left, right, ((front, front), ((), ())), preferred_element_type=dtype)


def _sum_of_rows(rows: Array) -> Array:
    return jnp.sum(rows, axis=tuple(range(rows.ndim - 1)))


def _sum_by_id(rows: Array, ids: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Row i of the result is the sum of the `rows` whose id is i: always in float32 or wider, as ids repeat."""
    wide = jnp.promote_types(jnp.float32, dtype)
    return jnp.zeros(shape, wide).at[ids].add(rows.astype(wide)).astype(dtype)


_matmul = _operation(
    lambda x, w: x @ w,
    lambda dy, w: dy @ w.T,
    lambda dy, x, w, dtype: _sum_of_products(x, dy, dtype),
)
_matmul_transposed = _operation(
    lambda x, w: x @ w.T,
    lambda dy, w: dy @ w,
    lambda dy, x, w, dtype: _sum_of_products(dy, x, dtype),
)
_scale = _operation(
    lambda x, w: w * x,
    lambda dy, w: w * dy,
    lambda dy, x, w, dtype: _sum_of_rows(dy.astype(dtype) * x.astype(dtype)),
)
_shift = _operation(
    lambda x, w: x + w,
    lambda dy, w: dy,
    lambda dy, x, w, dtype: _sum_of_rows(dy.astype(dtype)),
)
_lookup = _operation(
    lambda ids, w: w[ids],
    lambda dy, w: None,
    lambda dy, ids, w, dtype: _sum_by_id(dy, ids, w.shape, dtype),
)
_read = _operation(
    lambda like, w: w.astype(like.dtype),
    lambda dy, w: None,
    lambda dy, like, w, dtype: dy.astype(dtype),
)
