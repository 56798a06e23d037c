"""Counter-based dropout: `trainspec.rng`'s bits on JAX arrays, so that both backends drop the same elements.

JAX's own primitive is the same Threefry-2x32 with 20 rounds; written out in Python it would compile five times as long.

A mask is a function of (seed, module, step, row of the global batch, position, feature): topology, remat and microbatches
cannot change it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.random import threefry2x32_p

from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import rounded
from trainspec.rng import drop_threshold


class Stretch(NamedTuple):
    """Positions [first, first + S) of rows that have `positions`: what a module sees that is given a part of each row."""

    first: Array
    positions: int


class DropoutPoint(NamedTuple):
    """Where in the run a forward pass is: `step` counts updates from 0, `rows` [B] are rows of the global batch.

    `stretch` says which positions of the rows a module is given; None is all of them.
    """

    step: Array
    rows: Array
    stretch: Stretch | None = None


class DropoutKey(nnx.Variable):
    """Two uint32 words for each layer of a stack: constants of the module, never trained."""


def keep_mask(
    key: Array, *, step: Array, rows: Array, sequence_tokens: int, features: int, rate: float,
    stretch: Stretch | None = None,
) -> Array:  # fmt: skip
    """True where an element of x[B, S, F] is kept, bit-equal to torchtrain's.

    `key` is the module's two uint32 words; `rows` [B] are the examples' rows in the global batch. x is S positions of each
    row: a `stretch` of them, or all.
    """
    key0, key1 = threefry2x32_p.bind(key[0], key[1], step.astype(jnp.uint32), jnp.uint32(0))
    position = jnp.arange(sequence_tokens, dtype=jnp.uint32)
    if stretch is not None:
        position, sequence_tokens = position + stretch.first.astype(jnp.uint32), stretch.positions
    token = rows.astype(jnp.uint32)[:, None] * jnp.uint32(sequence_tokens) + position
    # Plus nothing, so that under a vmap over rows both words of a counter have its dimension.
    feature = jnp.arange(features, dtype=jnp.uint32) + (token - token)[..., None]
    shape = (*token.shape, features)
    words = (key0, key1, feature, token[..., None])
    bits, _ = threefry2x32_p.bind(*(jnp.broadcast_to(word, shape) for word in words))
    return bits >= jnp.uint32(drop_threshold(rate))


def dropped(
    x_BSF: Array, key: Array, *, step: Array, rows: Array, rate: float, stretch: Stretch | None = None
) -> Array:
    """x / (1 - rate), divided in the accumulation type, where `keep_mask` is true, else 0."""
    _, S, F = x_BSF.shape
    keep = keep_mask(key, step=step, rows=rows, sequence_tokens=S, features=F, rate=rate, stretch=stretch)
    kept = x_BSF.astype(accumulation_dtype(x_BSF.dtype)) / (1 - rate)
    return rounded(jnp.where(keep, kept.astype(x_BSF.dtype), 0))
