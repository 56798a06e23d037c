"""Attention by cuDNN, on NVIDIA's GPUs in bfloat16.

Its causal mask is aligned to the first key and knows no documents, so all but rows of one document get a boolean mask [B, 1, S,
T]: that is read by all heads and kept for none of them, but it grows with S².
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array

from jaxtrain.attention.devices import on_each_device
from jaxtrain.attention.kernel import Site
from jaxtrain.attention.visible import Visible
from jaxtrain.layers import Attend

# The largest head before NVIDIA's Hopper, and from it on; cuDNN takes multiples of 8 (jax._src.cudnn).
_LARGEST_HEAD, _LARGEST_HEAD_OF_HOPPER, _HOPPER = 128, 256, 9.0


def lack(site: Site) -> str | None:
    """What is not there that cuDNN needs."""
    if site.platform != "gpu":
        return "a GPU"
    if site.policy != "bf16":
        return "precision.policy=bf16"
    capability = float(getattr(site.mesh.devices.flat[0], "compute_capability", 0))
    largest = _LARGEST_HEAD_OF_HOPPER if capability >= _HOPPER else _LARGEST_HEAD
    if site.head_dim % 8 or site.head_dim > largest:
        return f"heads of a multiple of 8, at most {largest}"
    return None


def make(site: Site) -> Attend:
    """The kernel for a site."""
    return on_each_device(partial(attend, has_causal_rows=site.has_causal_rows), site.mesh)


def attend(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible, *, has_causal_rows: bool) -> Array:
    """Attention [B, S, H, D].

    With `has_causal_rows` (one document, then padding) no mask is needed: padding then sees the document, and nothing reads
    what it makes of it. Only where that is recorded it sees what it should.
    """
    is_causal = has_causal_rows and not visible.prefix and visible.window is None and not visible.is_recorded
    mask = None if is_causal else visible.mask()[:, None]
    return jax.nn.dot_product_attention(
        q_BSHD, k_BTKD, v_BTKD, mask=mask, is_causal=is_causal, implementation="cudnn"
    )
