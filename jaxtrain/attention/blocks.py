"""Attention by blocks of queries, in JAX alone: for any device and type. Nothing that is kept grows with S².

The scores of a block exist while it is computed, against the keys up to its own end: what comes later no query of it sees.
The backward pass makes them again from the log of the sum of their exponentials (FlashAttention, arXiv 2205.14135).

B batch, S queries, T = P + S keys (a prefix of P in front), H query heads, K kv heads, G query heads per kv head, D head dim,
R queries of a block, E keys that it is computed against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtrain.attention.visible import Visible
from jaxtrain.precision import accumulation_dtype, wide_product

# Queries in a block: of the sizes measured on a CPU with rows of 512, none was faster.
BLOCK = 128
# How many different blocks a program has, each with its number of keys. In longer rows each of them is a loop over several,
# with the keys of the last.
SECTIONS = 16
Arrays = TypeVar("Arrays")


class Section(NamedTuple):
    """`blocks` of `queries` queries each, from the query `begin` on."""

    begin: int
    queries: int
    blocks: int

    @property
    def end(self) -> int:
        """Where it ends: no query of it sees a key from there on."""
        return self.begin + self.queries * self.blocks


def sections(length: int) -> Iterator[Section]:
    """The sections of a row; where BLOCK does not divide its length, the last is the rest."""
    step = BLOCK * -(-length // (BLOCK * SECTIONS))
    for begin in range(0, length, step):
        blocks, rest = divmod(min(step, length - begin), BLOCK)
        if blocks:
            yield Section(begin, BLOCK, blocks)
        if rest:
            yield Section(begin + blocks * BLOCK, rest, 1)


class _Kept(NamedTuple):
    """What the backward pass needs: operands and result, heads in front, and the log-sum-exp of each query's scores."""

    q_BKSGD: Array
    k_BKTD: Array
    v_BKTD: Array
    visible: Visible
    mixed_BKSGD: Array
    log_sum_BKSG: Array


@jax.custom_vjp
def attend(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible) -> Array:
    """Grouped-query attention [B, S, H, D], softmax in the accumulation type, no copies of keys or values."""
    return _forward(q_BSHD, k_BTKD, v_BTKD, visible)[0]


def _forward(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible) -> tuple[Array, _Kept]:
    q, k, v = _grouped(q_BSHD, k_BTKD.shape[2]), jnp.swapaxes(k_BTKD, 1, 2), jnp.swapaxes(v_BTKD, 1, 2)
    parts: list[tuple[Array, Array]] = []
    for section in sections(q_BSHD.shape[1]):
        earlier = parts[-1][0] if parts else None
        operands = _Operands.of(section, q, k, v, visible)
        parts.append(_each_block(partial(_mixed, operands, earlier), section))
    mixed, log_sum = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
    return _ungrouped(mixed), _Kept(q, k, v, visible, mixed, log_sum)


def _backward(kept: _Kept, d_mixed_BSHD: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, mixed, log_sum = kept
    wide = accumulation_dtype(q.dtype)
    d_mixed = _grouped(d_mixed_BSHD, k.shape[1])
    # What the softmax takes from every score's cotangent: their mean under the shares.
    mean_BKSG = jnp.sum(d_mixed.astype(wide) * mixed.astype(wide), axis=-1)
    dk, dv = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    dq: list[Array] = []
    for section in sections(q.shape[2]):
        operands = _Operands.of(section, q, k, v, visible)
        keys = operands.k_BKED.shape[2]
        earlier = dq[-1] if dq else None
        block = partial(_gradients, operands, _Given(d_mixed, mean_BKSG, log_sum), earlier)
        totals = (dk[:, :, :keys], dv[:, :, :keys])
        if section.blocks == 1:
            totals, dq_BKRGD = block(totals, section.begin)
        else:
            totals, dq_NBKRGD = lax.scan(block, totals, _begins(section))
            dq_BKRGD = _together(dq_NBKRGD)
        dk, dv = (
            lax.dynamic_update_slice_in_dim(x, total, 0, axis=2)
            for x, total in zip((dk, dv), totals, strict=True)
        )
        dq.append(dq_BKRGD)
    dk_BTKD, dv_BTKD = (jnp.swapaxes(x, 1, 2).astype(k.dtype) for x in (dk, dv))
    return _ungrouped(jnp.concatenate(dq, axis=2)), dk_BTKD, dv_BTKD, None


attend.defvjp(_forward, _backward)


class _Operands(NamedTuple):
    """What the blocks of a section compute with: all queries, and the keys and values that they see some of."""

    section: Section
    q_BKSGD: Array
    k_BKED: Array
    v_BKED: Array
    visible: Visible

    @classmethod
    def of(
        cls, section: Section, q_BKSGD: Array, k_BKTD: Array, v_BKTD: Array, visible: Visible
    ) -> _Operands:
        """Those of a section: the whole prefix, and the keys up to the section's end."""
        keys = visible.prefix + section.end
        return cls(section, q_BKSGD, k_BKTD[:, :, :keys], v_BKTD[:, :, :keys], visible)

    def of_block(self, x_BKS: Array, begin: Array | int) -> Array:
        """Those of x [B, K, S, ...] that are a block's, which begins with the query `begin`."""
        return lax.dynamic_slice_in_dim(x_BKS, begin, self.section.queries, axis=2)

    def scores(self, begin: Array | int, earlier_BKSGD: Array | None) -> Array:
        """The scores [B, K, R, G, E] of a block, made after the result of an earlier section."""
        q_BKRGD = _after(self.of_block(self.q_BKSGD, begin), earlier_BKSGD)
        queries = begin + jnp.arange(self.section.queries)
        seen_BRE = self.visible.mask(queries, end=self.section.end)
        scores = wide_product("bkrgd,bked->bkrge", q_BKRGD, self.k_BKED) * q_BKRGD.shape[-1] ** -0.5
        return jnp.where(seen_BRE[:, None, :, None], scores, jnp.finfo(scores.dtype).min)


class _Given(NamedTuple):
    """What the backward pass of all blocks is given."""

    d_mixed_BKSGD: Array
    mean_BKSG: Array
    log_sum_BKSG: Array


def _mixed(operands: _Operands, earlier: Array | None, begin: Array | int) -> tuple[Array, Array]:
    """Of a block: the values mixed [B, K, R, G, D], and the log-sum-exp of its scores [B, K, R, G]."""
    v = operands.v_BKED
    scores = operands.scores(begin, earlier)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    shares = jnp.exp(scores - highest)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    mixed = wide_product("bkrge,bked->bkrgd", shares.astype(v.dtype), v) / total
    return mixed.astype(v.dtype), (highest + jnp.log(total))[..., 0]


def _gradients(
    operands: _Operands,
    given: _Given,
    earlier: Array | None,
    totals: tuple[Array, Array],
    begin: Array | int,
) -> tuple[tuple[Array, Array], Array]:
    """The gradients of keys and values with those of a block added to `totals`, and that of its queries."""
    k, v = operands.k_BKED, operands.v_BKED
    d_mixed, mean, log_sum = (operands.of_block(x, begin) for x in given)
    d_mixed = _after(d_mixed, earlier)
    shares = jnp.exp(operands.scores(begin, earlier) - log_sum[..., None])
    d_scores = (
        shares * (wide_product("bkrgd,bked->bkrge", d_mixed, v) - mean[..., None]) * k.shape[-1] ** -0.5
    )
    d_scores, shares = d_scores.astype(k.dtype), shares.astype(v.dtype)
    dk = totals[0] + wide_product("bkrge,bkrgd->bked", d_scores, operands.of_block(operands.q_BKSGD, begin))
    dv = totals[1] + wide_product("bkrge,bkrgd->bked", shares, d_mixed)
    return (dk, dv), wide_product("bkrge,bked->bkrgd", d_scores, k).astype(k.dtype)


def _after(x_BKRGD: Array, earlier_BKSGD: Array | None) -> Array:
    """x, made to depend on the section before: a compiler may else begin all sections at once, and keep the scores of all.

    No compiler leaves out a product with zero of a number that may not be finite. XLA's barrier does not do: on a CPU it is
    gone before the order of operations is chosen.
    """
    if earlier_BKSGD is None:
        return x_BKRGD
    return x_BKRGD + 0 * earlier_BKSGD[:, :, : x_BKRGD.shape[2]]


def _each_block(block: Callable[[Array | int], Arrays], section: Section) -> Arrays:
    """The arrays [B, K, R, ...] that `block` gives for each block of a section, as [B, K, its queries, ...]."""
    if section.blocks == 1:
        return block(section.begin)
    return jax.tree.map(_together, lax.map(block, _begins(section)))


def _begins(section: Section) -> Array:
    """The first query of each block."""
    return section.begin + section.queries * jnp.arange(section.blocks)


def _together(x_NBKR: Array) -> Array:
    """[N, B, K, R, ...] of N blocks as [B, K, N R, ...]."""
    x_BKNR = jnp.moveaxis(x_NBKR, 0, 2)
    return x_BKNR.reshape(*x_BKNR.shape[:2], -1, *x_BKNR.shape[4:])


def _grouped(x_BSHD: Array, kv_heads: int) -> Array:
    """[B, K, S, G, D]: the query heads by the kv head that they share."""
    B, S, H, D = x_BSHD.shape
    return jnp.swapaxes(x_BSHD.reshape(B, S, kv_heads, H // kv_heads, D), 1, 2)


def _ungrouped(x_BKSGD: Array) -> Array:
    """[B, S, H, D]."""
    B, K, S, G, D = x_BKSGD.shape
    return jnp.swapaxes(x_BKSGD, 1, 2).reshape(B, S, K * G, D)
