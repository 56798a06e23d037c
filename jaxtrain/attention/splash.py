"""Attention by JAX's splash kernel, on TPUs.

It takes segments, a causal mask or a window in places of the row, grouped heads. What it has no word for is virtual tokens,
which all segments see: attention to them (a prefix, or a prompt's) is computed apart, [S, V] scores of V virtual tokens, and
joined by the log-sum-exp. The gradients are those of the joined attention: the kernel's backward pass is given the joined result
and its log-sum-exp for its own.

B batch, S queries, T = P + S keys (a prefix of P in front), H query heads, K kv heads, G query heads per kv head, D head dim,
L padded length of a row, V virtual tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxtrain._jax import splash_gradients
from jaxtrain.attention import blocks
from jaxtrain.attention.devices import on_each_device
from jaxtrain.attention.kernel import AttentionSite
from jaxtrain.attention.visible import Visible
from jaxtrain.layers import VIRTUAL, Attend
from jaxtrain.precision import in_accumulation_type, wide_product

# Lanes of a TPU's vector unit: the kernel's blocks are multiples of it, and of a row's padded length divisors.
_LANES, _BLOCKS = 128, (512, 384, 256, 128)
# The segment of what pads a row to a multiple of _LANES.
_OUTSIDE = VIRTUAL - 1


def lack(site: AttentionSite) -> str | None:
    """What is not there that the kernel needs."""
    if site.platform != "tpu":
        return "a TPU"
    return "float32 or bfloat16" if site.policy == "fp64" else None


def make(site: AttentionSite) -> Attend:
    """The kernel for a site."""
    return on_each_device(partial(attend, interpret=False), site.mesh)


def attend(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible, *, interpret: bool) -> Array:
    """Grouped-query attention [B, S, H, D], softmax in float32. `interpret` runs the kernel without a TPU.

    Its window counts places in the row, which within a document is the same as positions. Padding has the position 0 everywhere:
    where what it makes of that is recorded, blocks of queries do the work.
    """
    if visible.window is not None and visible.is_recorded:
        return blocks.attend(q_BSHD, k_BTKD, v_BTKD, visible)
    S, D = q_BSHD.shape[1], q_BSHD.shape[3]
    scaled = (in_accumulation_type(q_BSHD) * D**-0.5).astype(q_BSHD.dtype)
    tokens = (scaled, k_BTKD[:, visible.prefix :], v_BTKD[:, visible.prefix :])
    q, k, v = (jnp.swapaxes(_padded(x), 1, 2) for x in tokens)
    segments = _padded(visible.segments_BS, _OUTSIDE)
    static = _Static(visible.window, interpret)
    virtual_tokens = visible.prefix + visible.prompt
    if virtual_tokens:
        seen = _padded(_sees_virtual(visible), False)
        virtual = (jnp.swapaxes(x[:, :virtual_tokens], 1, 2) for x in (k_BTKD, v_BTKD))
        mixed = _joined(static, q, k, v, segments, *virtual, seen)
    else:
        kernel = _kernel(static, q)
        mixed = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return jnp.swapaxes(mixed, 1, 2)[:, :S]  # pyright: ignore[reportArgumentType]


def _sees_virtual(visible: Visible) -> Array:
    """True [B, S, V] where a query sees a virtual token that the kernel does not show it.

    A prompt's virtual tokens are a segment of their own, within which the kernel does.
    """
    seen = visible.mask(end=visible.prompt)
    is_prompt_key = jnp.arange(seen.shape[2]) >= visible.prefix
    return seen & ~((visible.segments_BS == VIRTUAL)[:, :, None] & is_prompt_key)


def _padded(x_BS: Array, value: float = 0) -> Array:
    """x [B, S, ...] as [B, L, ...]."""
    widths = [(0, 0)] * x_BS.ndim
    widths[1] = (0, -x_BS.shape[1] % _LANES)
    return jnp.pad(x_BS, widths, constant_values=value)


class _Static(NamedTuple):
    """What is known of a call before its arrays are."""

    window: int | None
    interpret: bool


def _kernel(static: _Static, q_BHLD: Array, *, with_log_sum: bool = False) -> Any:
    """The kernel for one row, of tokens alone."""
    _, heads, length, _ = q_BHLD.shape
    block = next(block for block in _BLOCKS if length % block == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (length, length)
    mask = splash.CausalMask(shape)
    if static.window is not None:
        mask = splash.LocalMask(shape, window_size=(static.window - 1, 0), offset=0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=with_log_sum,
        interpret=static.interpret,
    )


class _Kept(NamedTuple):
    """What the backward pass needs: all operands, the joined result and its log-sum-exp."""

    q_BHLD: Array
    k_BKLD: Array
    v_BKLD: Array
    segments_BL: Array
    virtual_k_BKVD: Array
    virtual_v_BKVD: Array
    seen_BLV: Array
    mixed_BHLD: Array
    log_sum_BHL: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joined(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    virtual_k: Array,
    virtual_v: Array,
    seen: Array,
) -> Array:
    """Attention [B, H, L, D] of scaled queries to tokens of their own segment, and to virtual tokens as `seen` says."""
    return _forward(static, q, k, v, segments, virtual_k, virtual_v, seen)[0]


def _forward(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    virtual_k: Array,
    virtual_v: Array,
    seen: Array,
) -> tuple[Array, _Kept]:
    kernel = _kernel(static, q, with_log_sum=True)
    of_tokens, (token_sum_BHL,) = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    scores = _virtual_scores(q, virtual_k, seen)
    log_sum = jnp.logaddexp(_by_kv_head(token_sum_BHL, k), jax.nn.logsumexp(scores, axis=-1))
    shares_BKGLV = jnp.exp(scores - log_sum[..., None])
    of_virtual = wide_product("bkglv,bkvd->bkgld", shares_BKGLV.astype(v.dtype), virtual_v)
    share_BKGL = jnp.exp(_by_kv_head(token_sum_BHL, k) - log_sum)
    mixed = (_by_kv_head(of_tokens, k) * share_BKGL[..., None] + of_virtual).reshape(q.shape).astype(q.dtype)
    kept = _Kept(q, k, v, segments, virtual_k, virtual_v, seen, mixed, log_sum.reshape(token_sum_BHL.shape))
    return mixed, kept


def _backward(
    static: _Static, kept: _Kept, d_mixed: Array
) -> tuple[Array, Array, Array, None, Array, Array, None]:
    q, k, v, segments, virtual_k, virtual_v, seen, mixed, log_sum = kept
    kernel = _kernel(static, q)

    def of_tokens(q: Array, k: Array, v: Array, segments: Array, *rest: Array) -> tuple[Array, Array, Array]:
        return splash_gradients(kernel, q, k, v, splash.SegmentIds(segments, segments), *rest)

    dq, dk, dv = jax.vmap(of_tokens)(q, k, v, segments, mixed, log_sum, d_mixed)
    wide = log_sum.dtype
    d_grouped = _by_kv_head(d_mixed, k)
    mean_BKGL = jnp.sum(d_grouped.astype(wide) * _by_kv_head(mixed, k).astype(wide), axis=-1)
    shares = jnp.exp(_virtual_scores(q, virtual_k, seen) - _by_kv_head(log_sum, k)[..., None])
    d_scores = shares * (wide_product("bkgld,bkvd->bkglv", d_grouped, virtual_v) - mean_BKGL[..., None])
    d_scores = d_scores.astype(k.dtype)
    dq = dq + wide_product("bkglv,bkvd->bkgld", d_scores, virtual_k).reshape(q.shape).astype(q.dtype)
    d_virtual_k = wide_product("bkglv,bkgld->bkvd", d_scores, _by_kv_head(q, k)).astype(k.dtype)
    d_virtual_v = wide_product("bkglv,bkgld->bkvd", shares.astype(v.dtype), d_grouped).astype(v.dtype)
    return dq, dk, dv, None, d_virtual_k, d_virtual_v, None


_joined.defvjp(_forward, _backward)


def _virtual_scores(q_BHLD: Array, virtual_k_BKVD: Array, seen_BLV: Array) -> Array:
    """The scores [B, K, G, L, V] of virtual tokens."""
    scores = wide_product("bkgld,bkvd->bkglv", _by_kv_head(q_BHLD, virtual_k_BKVD), virtual_k_BKVD)
    return jnp.where(seen_BLV[:, None, None], scores, jnp.finfo(scores.dtype).min)


def _by_kv_head(x_BHL: Array, k_BK: Array) -> Array:
    """x [B, H, L, ...] as [B, K, G, L, ...], for keys [B, K, ...]."""
    return x_BHL.reshape(len(x_BHL), k_BK.shape[1], -1, *x_BHL.shape[2:])
