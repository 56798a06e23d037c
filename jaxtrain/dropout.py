"""Counter-based dropout: the same rounds as `trainspec.rng`, on JAX arrays, so that both backends drop the same.

A mask is a function of (seed, module, step, global row, position, feature): topology, rematerialisation and
microbatching cannot change it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from trainspec.rng import PARITY_CONSTANT, ROTATIONS, drop_threshold


class DropoutPoint(NamedTuple):
    """Where in the run a forward pass is: `step` counts updates from 0, `rows` [B] are rows of the global batch."""

    step: Array
    rows: Array


def keep_mask(
    key: Array, *, step: Array, rows: Array, sequence_tokens: int, features: int, rate: float
) -> Array:
    """True where an element of x[B, S, F] is kept, bit-equal to torchtrain's.

    `key` is the module's two uint32 words; `rows` [B] are global row indices.
    """
    folded = _threefry2x32((key[0], key[1]), jnp.uint32(step)[None], jnp.zeros(1, jnp.uint32))
    tokens = rows.astype(jnp.uint32)[:, None] * jnp.uint32(sequence_tokens) + jnp.arange(
        sequence_tokens, dtype=jnp.uint32
    )
    feature = jnp.arange(features, dtype=jnp.uint32)
    shape = (*tokens.shape, features)
    bits, _ = _threefry2x32(
        (folded[0][0], folded[1][0]),
        jnp.broadcast_to(feature, shape),
        jnp.broadcast_to(tokens[..., None], shape),
    )
    return bits >= jnp.uint32(drop_threshold(rate))


def _threefry2x32(key: tuple[Array, Array], counter0: Array, counter1: Array) -> tuple[Array, Array]:
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY_CONSTANT))
    x0, x1 = counter0 + keys[0], counter1 + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (
                jax.lax.shift_left(x1, jnp.uint32(rotation))
                | jax.lax.shift_right_logical(x1, jnp.uint32(32 - rotation))
            )
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1
