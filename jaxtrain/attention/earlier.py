"""Attention of one token of each row to those before it, whose keys and values are kept.

No kernel of its own is needed: one query has as few scores as a row has keys. The arithmetic is the reference's.

B batch, T keys that are kept (those of a prefix in front), H query heads, K kv heads, G query heads per kv head, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.attention.visible import Visible
from jaxtrain.layers import Attend, KeysValues
from jaxtrain.precision import wide_product


class Earlier(NamedTuple):
    """What a token of each row sees besides itself: keys and values [B, K, T, D], where `seen_BT` is true."""

    kept: KeysValues
    seen_BT: Array


def over_earlier_too(kernel: Attend) -> Attend:
    """`kernel` of whole rows, and `attend` where what the queries see is kept."""

    def either(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible | Earlier) -> Array:
        if isinstance(visible, Earlier):
            return attend(q_BSHD, k_BTKD, v_BTKD, visible)
        return kernel(q_BSHD, k_BTKD, v_BTKD, visible)

    return either


def attend(q_B1HD: Array, k_B1KD: Array, v_B1KD: Array, earlier: Earlier) -> Array:
    """Grouped-query attention [B, 1, H, D] to the token itself and to earlier ones, softmax in the accumulation type."""
    B, _, H, D = q_B1HD.shape
    k_BKD, v_BKD = k_B1KD[:, 0], v_B1KD[:, 0]
    q_BKGD = q_B1HD.reshape(B, k_BKD.shape[1], -1, D)
    scores_BKGT = wide_product("bkgd,bktd->bkgt", q_BKGD, earlier.kept.keys)
    scores_BKGT = jnp.where(earlier.seen_BT[:, None, None], scores_BKGT, jnp.finfo(scores_BKGT.dtype).min)
    own_BKG1 = wide_product("bkgd,bkd->bkg", q_BKGD, k_BKD)[..., None]
    scores = jnp.concatenate([scores_BKGT, own_BKG1], axis=-1) * D**-0.5
    shares = jax.nn.softmax(scores).astype(v_BKD.dtype)
    mixed_BKGD = wide_product("bkgt,bktd->bkgd", shares[..., :-1], earlier.kept.values)
    mixed_BKGD += wide_product("bkg,bkd->bkgd", shares[..., -1], v_BKD)
    return mixed_BKGD.astype(v_BKD.dtype).reshape(B, 1, H, D)
