"""Counter-based dropout: `trainspec.rng`'s bits on JAX arrays, so that both backends drop the same.

The rounds are JAX's own primitive, which is Threefry-2x32 with 20 rounds as well; unrolled by hand they compile
five times as long.

A mask is a function of (seed, module, step, global row, position, feature): topology, rematerialisation and
microbatching cannot change it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.random import threefry2x32_p

from jaxtrain.precision import accumulation_dtype
from trainspec.rng import drop_threshold


class DropoutPoint(NamedTuple):
    """Where in the run a forward pass is: `step` counts updates from 0, `rows` [B] are rows of the global batch."""

    step: Array
    rows: Array


class DropoutKey(nnx.Variable):
    """Two uint32 words, per layer where a module is stacked: constants of the module, never trained."""


def keep_mask(
    key: Array, *, step: Array, rows: Array, sequence_tokens: int, features: int, rate: float
) -> Array:
    """True where an element of x[B, S, F] is kept, bit-equal to torchtrain's.

    `key` is the module's two uint32 words; `rows` [B] are global row indices.
    """
    key0, key1 = threefry2x32_p.bind(key[0], key[1], step.astype(jnp.uint32), jnp.uint32(0))
    token = rows.astype(jnp.uint32)[:, None] * jnp.uint32(sequence_tokens)
    token += jnp.arange(sequence_tokens, dtype=jnp.uint32)
    feature = jnp.arange(features, dtype=jnp.uint32)
    shape = (*token.shape, features)
    words = (key0, key1, feature, token[..., None])
    bits, _ = threefry2x32_p.bind(*(jnp.broadcast_to(word, shape) for word in words))
    return bits >= jnp.uint32(drop_threshold(rate))


def dropped(x_BSF: Array, key: Array, *, step: Array, rows: Array, rate: float) -> Array:
    """x / (1 - rate), divided in the wide type, where the mask of `keep_mask` keeps x, else 0."""
    _, S, F = x_BSF.shape
    keep = keep_mask(key, step=step, rows=rows, sequence_tokens=S, features=F, rate=rate)
    kept = x_BSF.astype(accumulation_dtype(x_BSF.dtype)) / (1 - rate)
    return jnp.where(keep, kept.astype(x_BSF.dtype), 0)
