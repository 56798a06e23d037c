"""The Llama family as flax.nnx modules: the definition only. One block is stacked over layers and scanned.

B batch, S sequence, E embed, H query heads, K kv heads, G query heads per kv head, D head dim, L layers.
Weights are [in, out]; those of `layers` have L in front. Modules are born abstract (shapes only) and are merged
with arrays for each call, so everything around them is a function of plain dicts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.activations import Probes, Tap
from jaxtrain.dropout import DropoutPoint
from trainspec.model import ModelSpec, inverse_frequencies
from trainspec.plan import Policy
from trainspec.trace import LAYER_POINTS

COMPUTE_DTYPE: dict[Policy, DTypeLike] = {"fp64": jnp.float64, "fp32": jnp.float32, "bf16": jnp.bfloat16}


def wide(dtype: DTypeLike) -> np.dtype:
    """The type for norms, softmax, rotary tables and loss: float32, or float64 in fp64 runs."""
    return jnp.promote_types(jnp.float32, dtype)


def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A weight that has a shape and no value yet."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))  # pyright: ignore[reportArgumentType]


class Linear(nnx.Module):
    """y = x W + b with W [in, out]."""

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, stack: tuple[int, ...], dtype: DTypeLike
    ) -> None:
        self.kernel = abstract((*stack, in_size, out_size), dtype)
        self.bias = abstract((*stack, out_size), dtype) if bias else None

    def __call__(self, x: Array, point: DropoutPoint | None) -> Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token id to row; `attend` is the tied head."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike) -> None:
        self.embedding = abstract((vocab, embed), dtype)

    def __call__(self, ids_BS: Array) -> Array:
        return self.embedding[...][ids_BS]

    def attend(self, x_BSE: Array) -> Array:
        """Logits [B, S, vocab] of a head that is the embedding itself."""
        return x_BSE @ self.embedding[...].T


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x²) + eps) in the wide type, cast to the compute type, then times the weight."""

    def __init__(self, embed: int, *, eps: float, stack: tuple[int, ...], dtype: DTypeLike) -> None:
        self.scale = abstract((*stack, embed), dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x_wide = x.astype(wide(x.dtype))
        normed = x_wide * lax.rsqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * normed.astype(x.dtype)


def rotary_tables(spec: ModelSpec, positions_BS: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """cos and sin [B, S, 1, D] of the angle of each position and pair, made in the wide type."""
    inverse = jnp.asarray(inverse_frequencies(spec, wide(dtype)))
    half = positions_BS[..., None].astype(inverse.dtype) * inverse
    angle = jnp.concatenate([half, half], axis=-1)[:, :, None, :]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x_BSHD: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, Llama's pairing: element d turns with element d + D/2 (RoFormer, arXiv 2104.09864)."""
    first, second = jnp.split(x_BSHD, 2, axis=-1)
    return x_BSHD * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attend(q_BSHD: Array, k_BSKD: Array, v_BSKD: Array, mask_BSS: Array) -> Array:
    """Grouped-query attention [B, S, H, D], softmax in the wide type, no copies of keys or values."""
    B, S, H, D = q_BSHD.shape
    K = k_BSKD.shape[2]
    grouped = q_BSHD.reshape(B, S, K, H // K, D)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k_BSKD) * D**-0.5
    scores = scores.astype(wide(scores.dtype))
    scores = jnp.where(mask_BSS[:, None, None], scores, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", shares, v_BSKD).reshape(B, S, H, D)


class Attention(nnx.Module):
    """Rotary grouped-query self-attention."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], dtype: DTypeLike) -> None:
        q_size, kv_size, bias = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.attention_bias
        self.head_dim = spec.head_dim
        self.q_proj = Linear(spec.embed, q_size, bias=bias, stack=stack, dtype=dtype)
        self.k_proj = Linear(spec.embed, kv_size, bias=bias, stack=stack, dtype=dtype)
        self.v_proj = Linear(spec.embed, kv_size, bias=bias, stack=stack, dtype=dtype)
        self.o_proj = Linear(q_size, spec.embed, bias=bias, stack=stack, dtype=dtype)

    def __call__(
        self, x_BSE: Array, cos: Array, sin: Array, mask_BSS: Array, point: DropoutPoint | None
    ) -> Array:
        B, S, _ = x_BSE.shape
        q, k, v = (
            p(x_BSE, point).reshape(B, S, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask_BSS)
        return self.o_proj(mixed.reshape(B, S, -1), point)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], dtype: DTypeLike) -> None:
        self.gate_proj = Linear(spec.embed, spec.mlp, bias=spec.mlp_bias, stack=stack, dtype=dtype)
        self.up_proj = Linear(spec.embed, spec.mlp, bias=spec.mlp_bias, stack=stack, dtype=dtype)
        self.down_proj = Linear(spec.mlp, spec.embed, bias=spec.mlp_bias, stack=stack, dtype=dtype)

    def __call__(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BSE, point)) * self.up_proj(x_BSE, point), point)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], dtype: DTypeLike) -> None:
        self.input_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, dtype=dtype)
        self.self_attn = Attention(spec, stack=stack, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, dtype=dtype)
        self.mlp = SwiGLU(spec, stack=stack, dtype=dtype)

    def __call__(
        self, x_BSE: Array, cos: Array, sin: Array, mask_BSS: Array, point: DropoutPoint | None, tap: Tap
    ) -> Array:
        mixed = self.self_attn(self.input_layernorm(x_BSE), cos, sin, mask_BSS, point)
        x_BSE = x_BSE + tap("attention", mixed)
        inner = self.mlp(self.post_attention_layernorm(x_BSE), point)
        return tap("block", x_BSE + tap("mlp", inner))


class Llama(nnx.Module):
    """Token ids, positions and segments [B, S] to logits [B, S, vocab]."""

    def __init__(self, spec: ModelSpec, *, remat: str, dtype: DTypeLike) -> None:
        self.spec, self.remat = spec, remat
        self.embed_tokens = Embedding(spec.vocab, spec.embed, dtype=dtype)
        self.layers = Block(spec, stack=(spec.layers,), dtype=dtype)
        self.norm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=(), dtype=dtype)
        head = (
            None
            if spec.tied_embeddings
            else Linear(spec.embed, spec.vocab, bias=False, stack=(), dtype=dtype)
        )
        self.lm_head = head

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None = None,
        probes: Probes | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and the activations [.., B, S, ..] at the points that `probes` has (layers in front)."""
        probes = probes or {}
        tap = Tap(probes)
        x_BSE = tap("embedding", self.embed_tokens(input_ids))
        cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)
        mask_BSS = attention_mask(segments)
        definition, stacked = nnx.split(self.layers)

        def block(x_BSE: Array, layer: tuple[nnx.State, Probes]) -> tuple[Array, dict[str, Array]]:
            weights, layer_probes = layer
            inner_tap = Tap(layer_probes)
            x_BSE = nnx.merge(definition, weights)(x_BSE, cos, sin, mask_BSS, point, inner_tap)
            return x_BSE, inner_tap.seen

        if self.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)
        layer_probes = {name: probe for name, probe in probes.items() if name in LAYER_POINTS}
        x_BSE, seen = lax.scan(block, x_BSE, (stacked, layer_probes))
        x_BSE = tap("norm", self.norm(x_BSE))
        logits = self.embed_tokens.attend(x_BSE) if self.lm_head is None else self.lm_head(x_BSE, point)
        return tap("logits", logits), seen | tap.seen


def attention_mask(segments_BS: Array) -> Array:
    """True [B, S, S] where a query may look: at or before itself, in its own document. Padding (segment 0) sees
    padding, so no row of the softmax is empty."""
    order = jnp.arange(segments_BS.shape[1])
    return (order[:, None] >= order[None, :]) & (segments_BS[:, :, None] == segments_BS[:, None, :])


def build_model(spec: ModelSpec, *, policy: Policy, remat: str) -> Llama:
    """The model as shapes only; `weights.from_canonical` makes the arrays."""
    return Llama(spec, remat=remat, dtype=COMPUTE_DTYPE[policy])
