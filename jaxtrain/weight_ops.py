"""Operations on weights: each gathers its weight while it needs it, and sums the gradient in the type the recipe asks for.

An operation keeps the weight's *shard* for its backward pass, never the gathered weight: under `shards: params` a layer's
weights are whole only while that layer computes, and are gathered again in the backward pass. The gradient is that of
`grad_placeholder`, which has the type of `precision.reduce`: so products of bfloat16 numbers are summed in float32, over
tokens and over devices, where the recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxtrain.precision import accumulation_dtype, cpu_multiplies_bfloat16, in_accumulation_type
from jaxtrain.rounding import NO_SUMS, Contraction, Sums, contraction, rounded
from jaxtrain.sharding import WeightSharding


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "grad_placeholder", "chunk"),
    meta_fields=("sharding",),
)
@dataclass(frozen=True)
class BoundWeight:
    """A weight as the model's modules hold it: its stored `value`, and what its gradient is taken with respect to.

    `grad_placeholder` has the shape of `value` and the type of the gradient; its value is never read, and it is None for
    a frozen weight. In a stack of layers all but `sharding`, which is that of one layer, have layers in front (for decoding
    `value` may be a list of them, and `OutputsFirst`). Where a stage holds several model chunks, value and placeholder have the chunks in front,
    and `chunk` is the index of the one in use.
    """

    value: Array
    grad_placeholder: Array | None
    chunk: Array | None
    sharding: WeightSharding


@partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=())
@dataclass(frozen=True)
class OutputsFirst:
    """The value of a weight [in, out] as an array [out, in], which a CPU multiplies few rows with in two thirds of the time."""

    array: Array


# So many rows are few.
FEW_ROWS = 32


class _Operation(NamedTuple):
    """forward(x, w, platform), and its gradients: by x from (dy, w, platform), by w from (dy, x, like); w is gathered.

    The weight's gradient has the shape and type of `like`, and is summed in that type; `like` has the sharding of the weight
    in use. `contracts` says whether `forward` and the gradient by x are sums over features, `sums_positions` whether that by w is
    one over positions, `sums_ids` whether a row of it is one over the positions with its id.
    """

    forward: Callable[[Array, Array, str], Array]
    input_gradient: Callable[[Array, Array, str], Array | None]
    weight_gradient: Callable[[Array, Array, jax.ShapeDtypeStruct], Array]
    contracts: bool = False
    sums_positions: bool = False
    sums_ids: bool = False


def matmul(x: Array, weight: BoundWeight) -> Array:
    """x [..., in] times W [in, out]."""
    if isinstance(weight.value, OutputsFirst):
        return _run(_MATMUL_TRANSPOSED, x, _transposed(weight.value, weight))
    return _run(_MATMUL, x, weight)


def matmul_transposed(x: Array, weight: BoundWeight) -> Array:
    """x [..., in] times the transpose of W [out, in]: the tied head."""
    return _run(_MATMUL_TRANSPOSED, x, weight)


def scale(x: Array, weight: BoundWeight) -> Array:
    """w * x, w [features]."""
    return _run(_SCALE, x, weight)


def shift(x: Array, weight: BoundWeight) -> Array:
    """x + b, b [features]."""
    return _run(_SHIFT, x, weight)


def lookup(ids: Array, weight: BoundWeight) -> Array:
    """Rows `ids` [...] of W [rows, features]."""
    return _run(_LOOKUP, ids, weight)


def read(weight: BoundWeight) -> Array:
    """The gathered weight in the type of its gradient, in which gradients of what is computed from it are summed."""
    return _run(_READ, jnp.zeros((), weight.sharding.gradient_dtype), weight)


def hold(weight: BoundWeight, beside: Array) -> BoundWeight:
    """`weight` gathered for several operations in a row, not before `beside` is computed.

    Their gradients are those of one device's examples, sharded as the weight is in use, for `reduced`.
    """
    sharding = weight.sharding
    held = WeightSharding(
        sharding.in_use,
        needs_gather=False,
        gradient=None if sharding.gradient is None else sharding.in_use,
        gradient_dtype=accumulation_dtype(sharding.gradient_dtype),
    )
    return replace(weight, value=_gathered(weight.value, beside, sharding), sharding=held)


def reduced(gradients_R: Array, weight: BoundWeight) -> Array:
    """The gradient of `weight`, as an operation on it gives it, from those of R replicas' examples by `hold`'s."""
    sharding = weight.sharding
    zero = jnp.zeros((), sharding.gradient_dtype)
    # Not jnp.sum, which would sum over the devices in float32 whatever the recipe says.
    total = lax.reduce(gradients_R.astype(sharding.gradient_dtype), zero, lax.add, (0,))
    total = lax.with_sharding_constraint(total, sharding.in_use)
    return lax.with_sharding_constraint(total, sharding.gradient)


def _transposed(value: OutputsFirst, weight: BoundWeight) -> BoundWeight:
    """The transpose of a weight that is decoded with, which has no gradient."""
    in_use = weight.sharding.in_use
    turned = NamedSharding(in_use.mesh, PartitionSpec(*reversed(in_use.spec)))
    return replace(weight, value=value.array, sharding=replace(weight.sharding, in_use=turned))


def _run(operation: _Operation, x: Array, weight: BoundWeight) -> Array:
    sums = Sums(total=x.shape[-1]) if operation.contracts else NO_SUMS
    return rounded(_apply(operation, x, weight, contraction()), sums=sums)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(operation: _Operation, x: Array, weight: BoundWeight, rounds: Contraction | None) -> Array:
    return _forward(operation, x, weight, rounds)[0]


def _forward(
    operation: _Operation, x: Array, weight: BoundWeight, rounds: Contraction | None
) -> tuple[Array, tuple[Array, BoundWeight, Contraction | None]]:
    value = select_chunk(weight.value, weight.chunk)
    factor = rounds.factor(x, x.shape[-1], 0) if rounds and operation.contracts else x
    y = operation.forward(factor, _gathered(value, x, weight.sharding), _platform(weight.sharding.in_use))
    return y, (x, replace(weight, grad_placeholder=None), rounds)


def _backward(
    operation: _Operation, residuals: tuple[Array, BoundWeight, Contraction | None], dy: Array
) -> tuple[Array | None, BoundWeight, None]:
    x, weight, rounds = residuals
    sharding, value = weight.sharding, select_chunk(weight.value, weight.chunk)
    dw = None
    if sharding.gradient is not None:
        like = jax.ShapeDtypeStruct(value.shape, sharding.gradient_dtype, sharding=sharding.in_use)
        from_term, from_sum = _num_summed(operation, dy, x, like) if rounds else (0, 0)
        factor = rounds.factor(dy, from_term, 1) if rounds else dy
        dw = operation.weight_gradient(factor, x, like)
        dw = rounds.gradient(dw, from_sum, 4) if rounds else dw
        # First as the weight is used, then split: going straight there, the partitioner moves activations instead.
        dw = lax.with_sharding_constraint(dw, sharding.in_use)
        dw = lax.with_sharding_constraint(dw, sharding.gradient)
        dw = _scatter_chunk(dw, weight.chunk, len(weight.value))
    factor = rounds.factor(dy, dy.shape[-1], 2) if rounds and operation.contracts else dy
    dx = operation.input_gradient(factor, _gathered(value, dy, sharding), _platform(sharding.in_use))
    if rounds and operation.contracts:
        dx = rounds.total(cast(Array, dx), dy.shape[-1], 3)
    # A cotangent of None is zero: only the placeholder's is wanted.
    return dx, BoundWeight(cast(Array, None), dw, None, sharding), None


_apply.defvjp(_forward, _backward)


def _num_summed(
    operation: _Operation, dy: Array, x: Array, like: jax.ShapeDtypeStruct
) -> tuple[int | Array, int | Array]:
    """How many terms are summed to a weight's gradient, as seen from each term and from each result."""
    if operation.sums_positions:
        positions = dy.size // dy.shape[-1]
        return positions, positions
    if operation.sums_ids:  # as many as an id comes
        count = jnp.zeros(like.shape[0]).at[x].add(1.0)
        return count[x][..., None], count[:, None]
    return 0, 0


def select_chunk(chunks: Array, chunk: Array | None) -> Array:
    """The model chunk in use. Selected, not indexed: each stage uses another one, and indexing would be sending."""
    return chunks if chunk is None else lax.select_n(chunk, *chunks)


def _scatter_chunk(gradient: Array, chunk: Array | None, chunks: int) -> Array:
    """The gradient of all chunks, from that of the chunk in use: zero for the others."""
    if chunk is None:
        return gradient
    return jnp.stack([jnp.where(chunk == i, gradient, 0) for i in range(chunks)])


def _gathered(value: Array, beside: Array, sharding: WeightSharding) -> Array:
    """A weight gathered over fsdp, not before `beside` is computed.

    Without the barrier the compiler sees that every microbatch gathers the same head, or that the backward pass gathers
    what the forward pass did, and keeps the gathered weight in between.
    """
    if sharding.needs_gather:
        value, _ = lax.optimization_barrier((value, beside))
    return lax.with_sharding_constraint(value, sharding.in_use)


def _platform(sharding: Sharding | None) -> str:
    """That of the devices that a program is for, which may not be here."""
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh.devices.flat[0].platform


def _product(x: Array, w: Array, platform: str) -> Array:
    """x [..., in] times w [in, out], in the type of both.

    Where a CPU multiplies bfloat16, XLA's kernel for it does if the sums are stored in float32, as they are made; asked for
    bfloat16, the compiler multiplies float32 copies of x and w, which elsewhere is the faster way.
    """
    if x.dtype == jnp.bfloat16 and platform == "cpu" and cpu_multiplies_bfloat16():
        return jnp.matmul(x, w, preferred_element_type=accumulation_dtype(x.dtype)).astype(x.dtype)
    return x @ w


def _product_transposed(x: Array, w: Array, platform: str) -> Array:
    """x [..., in] times the transpose of W [out, in], in the type of both.

    A CPU reads W from one end to the other where it is the left factor. Without the barrier the compiler would turn a transposed
    product round again.
    """
    rows = x.size // x.shape[-1]
    if platform != "cpu" or rows > FEW_ROWS:
        return _product(x, w.T, platform)
    y_OR = _product(w, x.reshape(rows, -1).T, platform)
    return lax.optimization_barrier(y_OR).T.reshape(*x.shape[:-1], -1)


def _sum_of_products(a: Array, b: Array, like: jax.ShapeDtypeStruct) -> Array:
    """a [..., m] and b [..., n] contracted over all leading dimensions: [m, n], summed in the type of `like`.

    A CPU that does not multiply bfloat16 is given float32 copies where it sums in float32: the compiler would make none.
    """
    if a.dtype != like.dtype and _platform(like.sharding) == "cpu" and not cpu_multiplies_bfloat16():
        a, b = in_accumulation_type(a), in_accumulation_type(b)
    leading = tuple(range(a.ndim - 1))
    return lax.dot_general(a, b, ((leading, leading), ((), ())), preferred_element_type=like.dtype)


def _sum_over_leading(x: Array) -> Array:
    """[..., n] to [n]."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def _sum_by_id(vectors: Array, ids: Array, like: jax.ShapeDtypeStruct) -> Array:
    """Row i is the sum of the `vectors` whose id is i: always made in the accumulation type, as ids repeat."""
    dtype = accumulation_dtype(like.dtype)
    return jnp.zeros(like.shape, dtype).at[ids].add(vectors.astype(dtype)).astype(like.dtype)


_MATMUL = _Operation(
    forward=_product,
    input_gradient=lambda dy, w, platform: _product(dy, w.T, platform),
    weight_gradient=lambda dy, x, like: _sum_of_products(x, dy, like),
    contracts=True,
    sums_positions=True,
)
_MATMUL_TRANSPOSED = _Operation(
    forward=_product_transposed,
    input_gradient=_product,
    weight_gradient=lambda dy, x, like: _sum_of_products(dy, x, like),
    contracts=True,
    sums_positions=True,
)
_SCALE = _Operation(
    forward=lambda x, w, _: w * x,
    input_gradient=lambda dy, w, _: w * dy,
    weight_gradient=lambda dy, x, like: _sum_over_leading(dy.astype(like.dtype) * x.astype(like.dtype)),
    sums_positions=True,
)
_SHIFT = _Operation(
    forward=lambda x, w, _: x + w,
    input_gradient=lambda dy, w, _: dy,
    weight_gradient=lambda dy, x, like: _sum_over_leading(dy.astype(like.dtype)),
    sums_positions=True,
)
_LOOKUP = _Operation(
    forward=lambda ids, w, _: w[ids],
    input_gradient=lambda dy, w, _: None,
    weight_gradient=lambda dy, ids, like: _sum_by_id(dy, ids, like),
    sums_ids=True,
)
_READ = _Operation(
    forward=lambda zero, w, _: w.astype(zero.dtype),
    input_gradient=lambda dy, w, _: None,
    weight_gradient=lambda dy, zero, like: dy.astype(like.dtype),
)
