"""What the families' models are built from, as flax.nnx modules and functions: layers, norms, rotation, attention.

B batch, S sequence (with the virtual tokens of a prompt), E embed, H query heads, K kv heads, G query heads per kv head,
D head dim, N virtual tokens. Weights are [in, out]; those of a stack of layers have its length in front. Modules are
created abstract (shapes only), and merged with weights (`weight_ops.BoundWeight`) for each call: so everything around
them is a function of plain dicts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.dropout import DropoutPoint
from jaxtrain.precision import accumulation_dtype, computed_wide
from jaxtrain.rounding import Sums, in_sums, read_again, rounded, softmax
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


class Build(NamedTuple):
    """What every module is built with: the compute type, and what shards its activations."""

    dtype: np.dtype
    constrain: Constrain


def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A weight with a shape and no value."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))  # pyright: ignore[reportArgumentType]


class VirtualTokens(NamedTuple):
    """Virtual tokens, the same for every example, in the type that gradients are summed in.

    `prompt` [N, E] are embeddings before those of the tokens; `prefix` [L, N, 2, K, D] are each layer's keys and values.
    """

    prompt: Array | None = None
    prefix: Array | None = None


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


@computed_wide
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, arXiv 2002.05202."""
    return rounded(rounded(jax.nn.silu(gate)) * up)


def attend(q_BSHD: Array, k_BSKD: Array, v_BSKD: Array, mask_BSS: Array) -> Array:
    """Grouped-query attention [B, S, H, D], softmax in the accumulation type, no copies of keys or values."""
    B, S, H, D = q_BSHD.shape
    K = k_BSKD.shape[2]
    keys, group_queries = k_BSKD.shape[1], S * (H // K)
    q_BSHD = in_sums(q_BSHD, Sums(factor=D, back_total=keys))
    k_BSKD, v_BSKD = (in_sums(x, Sums(back_total=group_queries)) for x in (k_BSKD, v_BSKD))
    grouped = q_BSHD.reshape(B, S, K, H // K, D)
    scores_dtype = accumulation_dtype(q_BSHD.dtype)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k_BSKD, preferred_element_type=scores_dtype) * D**-0.5
    scores = rounded(scores, "wide", sums=Sums(total=D, back_factor=max(keys, group_queries)))
    scores = jnp.where(mask_BSS[:, None, None], scores, jnp.finfo(scores.dtype).min)
    shares = rounded(softmax(scores).astype(v_BSKD.dtype), sums=Sums(factor=keys, back_total=D))
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", shares, v_BSKD)
    mixed = read_again(mixed, scores)
    return rounded(mixed, sums=Sums(total=keys, back_factor=max(D, group_queries))).reshape(B, S, H, D)


def attention_mask(segments_BS: Array) -> Array:
    """True [B, S, S] where a query sees a key: at or before itself, of its own segment or a virtual token.

    Padding (segment 0) sees padding, so no row of the softmax is empty.
    """
    order = jnp.arange(segments_BS.shape[1])
    is_own = segments_BS[:, :, None] == segments_BS[:, None, :]
    is_virtual = segments_BS[:, None, :] == VIRTUAL
    return (order[:, None] >= order[None, :]) & (is_own | is_virtual)


def in_window(mask_BST: Array, positions_BS: Array, window: int) -> Array:
    """`mask_BST` [B, S, T] where a key's position is less than `window` before the query's.

    Keys before those of the S tokens are a prefix, at positions 0, 1, ...
    """
    B, S, T = mask_BST.shape
    prefix = jnp.broadcast_to(jnp.arange(T - S, dtype=positions_BS.dtype), (B, T - S))
    positions_BT = jnp.concatenate([prefix, positions_BS], axis=1)
    return mask_BST & (positions_BS[:, :, None] - positions_BT[:, None, :] < window)
