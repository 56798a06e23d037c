"""The loss is a sum and a count; the one division, by the global count, is in `step.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtrain.precision import accumulation_dtype
from trainspec.data import IGNORED


def token_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Sum of the cross-entropies of logits [B, S, V] and how many tokens that is.

    `labels` [B, S] stand at the inputs' positions: position s predicts label s + 1. Computed in the accumulation type.
    """
    wide = logits[:, :-1].astype(accumulation_dtype(logits.dtype))
    targets = labels[:, 1:]
    counted = targets != IGNORED
    # Picked by comparing, not by indexing: where the vocabulary is split, every device looks at its own part.
    vocab = lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1)
    picked = jnp.sum(jnp.where(vocab == targets[..., None], wide, 0.0), axis=-1)
    losses = jax.nn.logsumexp(wide, axis=-1) - picked
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted)
