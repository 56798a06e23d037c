"""The loss is a sum and a count; `program.py` divides once, by the global count."""

# B examples, S sequence, V vocabulary

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import rounded
from trainspec.data import IGNORED


def token_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """(sum of the cross-entropies of `logits` [B, S, V], number of target tokens).

    `labels` [B, S] stand at their token's own position; the logits at s predict the label at s + 1. Labels equal
    to IGNORED do not count. Computed in the accumulation type.
    """
    return target_loss(logits[:, :-1], labels[:, 1:])


def targets_of(labels: Array) -> Array:
    """What the logits of each position [B, S] predict: the next one's label; the last ones predict nothing."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


def target_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """`token_loss` where `targets` [B, S] stand at the positions whose logits predict them."""
    wide = logits.astype(accumulation_dtype(logits.dtype))
    counted = targets != IGNORED
    # Picked by comparing, not by indexing: so every device looks at its own shard of a split vocabulary.
    vocab = lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1)
    picked = jnp.sum(jnp.where(vocab == targets[..., None], wide, 0.0), axis=-1)
    losses = rounded(rounded(jax.nn.logsumexp(wide, axis=-1), "wide") - picked, "wide")
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted)
