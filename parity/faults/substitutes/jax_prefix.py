"""A prefix that is rotated like the keys of tokens."""

# L layers, N virtual tokens, K kv heads, D head dim

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxtrain.layers import rotary_tables, rotate
from trainspec.model import ModelSpec


def rotated(prefix_LN2KD: Array, spec: ModelSpec) -> Array:
    """The prefix with its keys rotated like those of tokens at positions 0, 1, ..."""
    positions_1N = jnp.arange(prefix_LN2KD.shape[1])[None]
    tables = rotary_tables(spec, positions_1N, prefix_LN2KD.dtype)
    return prefix_LN2KD.at[:, :, 0].set(rotate(prefix_LN2KD[:, :, 0], *tables))
