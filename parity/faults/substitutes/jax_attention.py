"""The gradient of attention's scores where its parts are joined by a log-sum-exp that is taken for a constant."""

# B batch, K kv heads, R queries of a block, G query heads per kv head, E keys, those of a prefix in front

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def means_of_parts(shares_BKRGE: Array, d_shares_BKRGE: Array, prefix: int) -> Array:
    """What each score's cotangent is taken from: the mean of its own part, the prefix or the tokens, not that of all keys."""
    means = []
    for part in (slice(prefix), slice(prefix, None)):
        shares, d_shares = shares_BKRGE[..., part], d_shares_BKRGE[..., part]
        total = jnp.sum(shares, axis=-1, keepdims=True)
        mean = jnp.sum(shares * d_shares, axis=-1, keepdims=True) / total
        means.append(jnp.broadcast_to(mean, shares.shape))
    return jnp.concatenate(means, axis=-1)
