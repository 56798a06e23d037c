"""Attention of one token of each row to those before it, whose keys and values are kept.

No kernel of its own is needed: one query has as few scores as a row has keys. The arithmetic is the reference's.

B rows, T keys that are kept (those of a prefix in front), H query heads, K kv heads, G query heads per kv head, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.attention.visible import Visible
from jaxtrain.layers import Attend, KeysValues
from jaxtrain.precision import wide_product


class OneToken(NamedTuple):
    """What a token of each row sees: of a layer's kept keys [B, K, D, T] and values [B, K, T, D] those where `seen_BT` is true.

    They are to have its own, too, at its row's place in `places_B`.
    """

    kept: KeysValues
    seen_BT: Array
    places_B: Array

    def with_own(self, k_B1KD: Array, v_B1KD: Array) -> KeysValues:
        """What is kept with the token's own keys and values in it; a row without a place for them stays as it is."""

        def with_key(row_KDT: Array, own_1KD: Array, place: Array) -> Array:
            return row_KDT.at[:, :, place].set(own_1KD[0], mode="drop")

        def with_value(row_KTD: Array, own_1KD: Array, place: Array) -> Array:
            return row_KTD.at[:, place].set(own_1KD[0], mode="drop")

        return KeysValues(
            jax.vmap(with_key)(self.kept.keys, k_B1KD, self.places_B),
            jax.vmap(with_value)(self.kept.values, v_B1KD, self.places_B),
        )


def over_one_token_too(kernel: Attend) -> Attend:
    """`kernel` of whole rows, and `attend` where what the queries see is kept."""

    def either(q_BSHD: Array, k: Array, v: Array, visible: Visible | OneToken) -> Array:
        if isinstance(visible, OneToken):
            return attend(q_BSHD, k, v, visible.seen_BT)
        return kernel(q_BSHD, k, v, visible)

    return either


def attend(q_B1HD: Array, k_BKDT: Array, v_BKTD: Array, seen_BT: Array) -> Array:
    """Grouped-query attention [B, 1, H, D] of a token of each row, softmax in the accumulation type, no copies of keys or values."""
    B, _, H, D = q_B1HD.shape
    q_BKGD = q_B1HD.reshape(B, k_BKDT.shape[1], -1, D)
    scores = wide_product("bkgd,bkdt->bkgt", q_BKGD, k_BKDT) * D**-0.5
    scores = jnp.where(seen_BT[:, None, None], scores, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores).astype(v_BKTD.dtype)
    return jnp.einsum("bkgt,bktd->bkgd", shares, v_BKTD).reshape(B, 1, H, D)
