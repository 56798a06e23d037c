"""Attention by cuDNN, on NVIDIA's GPUs in bfloat16.

Its causal mask is aligned to the first key and knows no documents, so all but rows of one document get a boolean mask [B, 1, S,
T]: that is read by all heads and kept for none of them, but it grows with S². JAX refuses its backward pass for
odd lengths, with a mask or without, so they get one more.

B batch, S queries, T = P + S keys (a prefix of P in front), H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.attention.devices import on_each_device
from jaxtrain.attention.kernel import AttentionSite
from jaxtrain.attention.visible import Visible
from jaxtrain.layers import Attend

# The largest head before NVIDIA's Hopper, and from it on; cuDNN takes multiples of 8 (jax._src.cudnn).
_LARGEST_HEAD, _LARGEST_HEAD_OF_HOPPER, _HOPPER = 128, 256, 9.0


def lack(site: AttentionSite) -> str | None:
    """What is not there that cuDNN needs."""
    if site.platform != "gpu":
        return "a GPU"
    if site.policy != "bf16":
        return "precision.policy=bf16"
    capability = float(site.mesh.devices.flat[0].compute_capability)
    largest = _LARGEST_HEAD_OF_HOPPER if capability >= _HOPPER else _LARGEST_HEAD
    if site.head_dim % 8 or site.head_dim > largest:
        return f"heads of a multiple of 8, at most {largest}"
    return None


def make(site: AttentionSite) -> Attend:
    """The kernel for a site."""
    return on_each_device(partial(attend, has_causal_rows=site.has_causal_rows), site.mesh)


def attend(
    q_BSHD: Array,
    k_BTKD: Array,
    v_BTKD: Array,
    visible: Visible,
    *,
    has_causal_rows: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Attention [B, S, H, D].

    With `has_causal_rows` (one document, then padding) no mask is needed: padding then sees the document, and nothing reads
    what it makes of it. Only where that is recorded it sees what it should. `xla` computes the same without a GPU.
    """
    is_causal = has_causal_rows and not visible.prefix and visible.window is None and not visible.is_recorded
    q, k, v = (_even(x) for x in (q_BSHD, k_BTKD, v_BTKD))
    mask = None if is_causal else _even_mask(visible.mask())[:, None]
    mixed_BSHD = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=is_causal, implementation=implementation
    )
    return mixed_BSHD[:, : q_BSHD.shape[1]]


def _even(x_BSHD: Array) -> Array:
    """x with zeros at one more place where its length is odd."""
    return jnp.pad(x_BSHD, ((0, 0), (0, x_BSHD.shape[1] % 2), (0, 0), (0, 0)))


def _even_mask(mask_BST: Array) -> Array:
    """The mask of even lengths: no query sees a key that is added, and a query that is added sees what the last one does."""
    _, S, T = mask_BST.shape
    mask_BST = jnp.pad(mask_BST, ((0, 0), (0, 0), (0, T % 2)))
    return jnp.pad(mask_BST, ((0, 0), (0, S % 2), (0, 0)), mode="edge")
