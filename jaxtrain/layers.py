"""What the families' models are built from, as flax.nnx modules and functions: layers, norms, rotation, masks.

B batch, S sequence (with the virtual tokens of a prompt), E embed, H query heads, K kv heads, D head dim, N virtual tokens,
T keys (those of a prefix in front), Q queries. Weights are [in, out]; those of a stack of layers have its length in front.
Modules are created abstract (shapes only), and merged with weights (`weight_ops.BoundWeight`) for each call: so everything
around them is a function of plain dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.dropout import DropoutPoint
from jaxtrain.precision import accumulation_dtype, computed_wide
from jaxtrain.rounding import rounded
from jaxtrain.sharding import Constrain
from jaxtrain.weight_ops import lookup, matmul, matmul_transposed, scale, shift
from trainspec.model import ModelSpec
from trainspec.rope import inverse_frequencies, table_factor

# The segment of a prompt's virtual tokens, which every segment sees.
VIRTUAL = -1


class Dim(NamedTuple):
    """A dimension of a weight: its logical axis and its size."""

    axis: str
    size: int


# Attention [B, S, H, D] of queries [B, S, H, D] to keys and values [B, T, K, D]; last what they see, an `attention.Visible`.
Attend = Callable[[Array, Array, Array, Any], Array]


class Build(NamedTuple):
    """What every module is built with: the compute type, what shards its activations, and what computes attention."""

    dtype: np.dtype
    constrain: Constrain
    attend: Attend


def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A weight with a shape and no value."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))  # pyright: ignore[reportArgumentType]


class VirtualTokens(NamedTuple):
    """Virtual tokens, the same for every example, in the type that gradients are summed in.

    `prompt` [N, E] are embeddings before those of the tokens; `prefix` [L, N, 2, K, D] are each layer's keys and values.
    """

    prompt: Array | None = None
    prefix: Array | None = None


class KeysValues(NamedTuple):
    """Keys, rotated, and values: [B, T, K, D] as attention sees them; a cache keeps keys [B, K, D, T] and values [B, K, T, D]."""

    keys: Array
    values: Array


class Encoder(Protocol):
    """The module that makes virtual tokens."""

    def __call__(self, step: Array | None) -> VirtualTokens:
        """The virtual tokens of update `step`; None is without dropout."""
        ...


def repeated(virtual_N: Array, x: Array) -> Array:
    """[B, N, ...]: `virtual_N` [N, ...] for each of the examples of x [B, ...], in the type of x."""
    return jnp.broadcast_to(virtual_N, (len(x), *virtual_N.shape)).astype(x.dtype)


def in_front(virtual_BN: Array, x: Array) -> Array:
    """[B, N + S, ...]: virtual tokens before those of x [B, S, ...]."""
    return jnp.concatenate([virtual_BN, x], axis=1)


class Linear(nnx.Module):
    """y = x W + b with W [in, out]."""

    def __init__(
        self, in_dim: Dim, out_dim: Dim, *, bias: bool, stack: tuple[int, ...], build: Build
    ) -> None:
        self.kernel = abstract((*stack, in_dim.size, out_dim.size), build.dtype)
        self.bias = abstract((*stack, out_dim.size), build.dtype) if bias else None
        self.in_axis, self.out_axis, self.constrain = in_dim.axis, out_dim.axis, build.constrain

    def __call__(self, x_BSI: Array, point: DropoutPoint | None) -> Array:
        x_BSI = self.constrain(x_BSI, ("batch", "seq", self.in_axis))
        y_BSO = self.constrain(matmul(x_BSI, self.kernel.get_value()), ("batch", "seq", self.out_axis))
        return y_BSO if self.bias is None else shift(y_BSO, self.bias.get_value())


class Embedding(nnx.Module):
    """Token ids to vectors; `attend` is the tied head."""

    def __init__(self, vocab: int, embed: int, *, build: Build) -> None:
        self.embedding = abstract((vocab, embed), build.dtype)
        self.constrain = build.constrain

    def __call__(self, ids_BS: Array) -> Array:
        return self.constrain(lookup(ids_BS, self.embedding.get_value()), ("batch", "seq", "embed"))

    def attend(self, x_BSE: Array) -> Array:
        """Logits [B, S, vocab] of a head that is the embedding."""
        return self.constrain(matmul_transposed(x_BSE, self.embedding.get_value()), ("batch", "seq", "vocab"))


def project(layer: Embedding | Linear, x_BSE: Array, point: DropoutPoint | None) -> Array:
    """Logits [B, S, vocab] of a head, which may be the embedding."""
    return layer.attend(x_BSE) if isinstance(layer, Embedding) else layer(x_BSE, point)


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x²) + eps) over the last dimension in the accumulation type, cast to the compute type, times the weight."""

    def __init__(self, size: int, *, eps: float, stack: tuple[int, ...], build: Build) -> None:
        self.scale = abstract((*stack, size), build.dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        @computed_wide
        def normed(x_wide: Array) -> Array:
            mean = rounded(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True), "wide", terms=x.shape[-1])
            return x_wide * lax.rsqrt(mean + self.eps)

        return scale(rounded(normed(x)), self.scale.get_value())


def rotary_tables(spec: ModelSpec, positions_BS: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """cos and sin [B, S, 1, R] of the angle of each position and pair, computed in the accumulation type.

    R is the number of rotated elements of a head.
    """
    inverse = jnp.asarray(inverse_frequencies(spec, accumulation_dtype(dtype)))
    half = positions_BS[..., None].astype(inverse.dtype) * inverse
    angle = jnp.concatenate([half, half], axis=-1)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if (factor := table_factor(spec)) != 1:
        cos, sin = cos * factor, sin * factor
    return cos.astype(dtype), sin.astype(dtype)


@computed_wide
def rotate(x_BSHD: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, Llama's pairing: element d turns with element d + D/2 (RoFormer, arXiv 2104.09864)."""
    first, second = jnp.split(x_BSHD, 2, axis=-1)
    return rounded(x_BSHD * cos + jnp.concatenate([-second, first], axis=-1) * sin)


def at_position(x_BTE: Array, position_B: Array) -> Array:
    """One position of each row, [B, 1, E]."""
    return jnp.take_along_axis(x_BTE, position_B[:, None, None], axis=1)


@computed_wide
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, arXiv 2002.05202."""
    return rounded(rounded(jax.nn.silu(gate)) * up)


def attention_mask(segments_BS: Array, queries: Array | None = None, end: int | None = None) -> Array:
    """True [B, Q, E] where a query sees a key: at or before itself, of its own segment or a virtual token.

    Padding (segment 0) sees padding, so no row of the softmax is empty. `queries` [Q], or [B, Q] if each row has its own, are the
    places in the row of those that are asked for, and `end` is the place of the first key that is not; None asks for all.
    """
    order = jnp.arange(segments_BS.shape[1])
    query_order = order if queries is None else queries
    own_BQ, keys_BE = _of_queries(segments_BS, queries), segments_BS[:, :end]
    is_own = own_BQ[:, :, None] == keys_BE[:, None, :]
    is_virtual = keys_BE[:, None, :] == VIRTUAL
    return (query_order[..., None] >= order[:end]) & (is_own | is_virtual)


def in_window(
    mask_BQT: Array, positions_BS: Array, window: int, queries: Array | None = None, end: int | None = None
) -> Array:
    """`mask_BQT` [B, Q, T] where a key's position is less than `window` before the query's.

    Keys before those of the tokens are a prefix, at positions 0, 1, ... `queries` and `end` are as in `attention_mask`.
    """
    keys_BE = positions_BS[:, :end]
    prefix_tokens = mask_BQT.shape[2] - keys_BE.shape[1]
    prefix = jnp.broadcast_to(jnp.arange(prefix_tokens, dtype=keys_BE.dtype), (len(keys_BE), prefix_tokens))
    positions_BT = jnp.concatenate([prefix, keys_BE], axis=1)
    distance = _of_queries(positions_BS, queries)[:, :, None] - positions_BT[:, None, :]
    return mask_BQT & (distance < window)


def _of_queries(x_BS: Array, queries: Array | None) -> Array:
    """x [B, Q]: that of each query; all S are queries where none are named."""
    if queries is None:
        return x_BS
    return x_BS[:, queries] if queries.ndim == 1 else jnp.take_along_axis(x_BS, queries, axis=1)
