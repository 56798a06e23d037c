"""The definition of attention: all scores at once, with the roundings that are simulated for `parity`'s bounds.

B batch, S queries, T keys (those of a prefix in front), H query heads, K kv heads, G query heads per kv head, D head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxtrain.attention.visible import Visible
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import Sums, in_sums, read_again, rounded, softmax


def attend(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible) -> Array:
    """Grouped-query attention [B, S, H, D], softmax in the accumulation type, no copies of keys or values."""
    B, S, H, D = q_BSHD.shape
    K = k_BTKD.shape[2]
    keys, group_queries = k_BTKD.shape[1], S * (H // K)
    q_BSHD = in_sums(q_BSHD, Sums(factor=D, back_total=keys))
    k_BTKD, v_BTKD = (in_sums(x, Sums(back_total=group_queries)) for x in (k_BTKD, v_BTKD))
    grouped = q_BSHD.reshape(B, S, K, H // K, D)
    scores_dtype = accumulation_dtype(q_BSHD.dtype)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k_BTKD, preferred_element_type=scores_dtype) * D**-0.5
    scores = rounded(scores, "wide", sums=Sums(total=D, back_factor=max(keys, group_queries)))
    scores = jnp.where(visible.mask()[:, None, None], scores, jnp.finfo(scores.dtype).min)
    shares = rounded(softmax(scores).astype(v_BTKD.dtype), sums=Sums(factor=keys, back_total=D))
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", shares, v_BTKD)
    mixed = read_again(mixed, scores)
    return rounded(mixed, sums=Sums(total=keys, back_factor=max(D, group_queries))).reshape(B, S, H, D)
