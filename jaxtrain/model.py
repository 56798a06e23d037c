"""The Llama family as flax.nnx modules: the definition only. One block is stacked over layers and scanned.

B batch, S sequence, E embed, H query heads, K kv heads, G query heads per kv head, D head dim, L layers,
N virtual tokens (those of a prompt are rows of the sequence, those of a prefix are not).
Weights are [in, out]; those of `layers` have L in front. Modules are born abstract (shapes only) and are merged
with weights (`tensor.Weight`) for each call, so everything around them is a function of plain dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.activations import Probes, Tap
from jaxtrain.dropout import DropoutPoint
from jaxtrain.tensor import Constrain, lookup, matmul, matmul_transposed, scale, shift
from trainspec.model import ModelSpec, inverse_frequencies
from trainspec.plan import COMPUTE_DTYPE, Policy
from trainspec.trace import LAYER_POINTS

# The segment of virtual tokens, which every document sees.
VIRTUAL = -1


class Dim(NamedTuple):
    """A dimension of a weight: its logical axis and its size."""

    axis: str
    size: int


class Build(NamedTuple):
    """What every module is built with: the compute type, and `constrain` for its activations."""

    dtype: np.dtype
    constrain: Constrain


def wide(dtype: DTypeLike) -> np.dtype:
    """The type for norms, softmax, rotary tables and loss: float32, or float64 in fp64 runs."""
    return jnp.promote_types(jnp.float32, dtype)


def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A weight that has a shape and no value yet."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))  # pyright: ignore[reportArgumentType]


class VirtualTokens(NamedTuple):
    """What stands before the tokens of every example, in the type that gradients are summed in.

    `rows` [N, E] are in front of the embedded tokens; `prefix` [L, N, 2, K, D] are keys and values of each layer.
    """

    rows: Array | None = None
    prefix: Array | None = None


class Encoder(Protocol):
    """Makes virtual tokens."""

    def __call__(self, step: Array | None) -> VirtualTokens:
        """Those of update `step`; None is without dropout."""
        ...


def in_front(rows: Array, x: Array) -> Array:
    """`rows` [N, ...] before each x [B, S, ...], in the type of x."""
    repeated = jnp.broadcast_to(rows, (len(x), *rows.shape)).astype(x.dtype)
    return jnp.concatenate([repeated, x], axis=1)


class Linear(nnx.Module):
    """y = x W + b with W [in, out]."""

    def __init__(
        self, in_dim: Dim, out_dim: Dim, *, bias: bool, stack: tuple[int, ...], build: Build
    ) -> None:
        self.kernel = abstract((*stack, in_dim.size, out_dim.size), build.dtype)
        self.bias = abstract((*stack, out_dim.size), build.dtype) if bias else None
        self.in_axis, self.out_axis, self.constrain = in_dim.axis, out_dim.axis, build.constrain

    def __call__(self, x_BSI: Array, point: DropoutPoint | None) -> Array:
        x_BSI = self.constrain(x_BSI, ("batch", "seq", self.in_axis))
        y_BSO = self.constrain(matmul(x_BSI, self.kernel.get_value()), ("batch", "seq", self.out_axis))
        return y_BSO if self.bias is None else shift(y_BSO, self.bias.get_value())


class Embedding(nnx.Module):
    """Token id to row; `attend` is the tied head."""

    def __init__(self, vocab: int, embed: int, *, build: Build) -> None:
        self.embedding = abstract((vocab, embed), build.dtype)
        self.constrain = build.constrain

    def __call__(self, ids_BS: Array) -> Array:
        return self.constrain(lookup(ids_BS, self.embedding.get_value()), ("batch", "seq", "embed"))

    def attend(self, x_BSE: Array) -> Array:
        """Logits [B, S, vocab] of a head that is the embedding itself."""
        return self.constrain(matmul_transposed(x_BSE, self.embedding.get_value()), ("batch", "seq", "vocab"))


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x²) + eps) in the wide type, cast to the compute type, then times the weight."""

    def __init__(self, embed: int, *, eps: float, stack: tuple[int, ...], build: Build) -> None:
        self.scale = abstract((*stack, embed), build.dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x_wide = x.astype(wide(x.dtype))
        normed = x_wide * lax.rsqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True) + self.eps)
        return scale(normed.astype(x.dtype), self.scale.get_value())


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
    wide_type = wide(q_BSHD.dtype)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k_BSKD, preferred_element_type=wide_type) * D**-0.5
    scores = jnp.where(mask_BSS[:, None, None], scores, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", shares, v_BSKD).reshape(B, S, H, D)


class Attention(nnx.Module):
    """Rotary grouped-query self-attention."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        embed = Dim("embed", spec.embed)
        q_dim = Dim("heads", spec.heads * spec.head_dim)
        kv_dim = Dim("kv_heads", spec.kv_heads * spec.head_dim)
        bias = spec.attention_bias
        self.head_dim, self.constrain = spec.head_dim, build.constrain
        self.q_proj = Linear(embed, q_dim, bias=bias, stack=stack, build=build)
        self.k_proj = Linear(embed, kv_dim, bias=bias, stack=stack, build=build)
        self.v_proj = Linear(embed, kv_dim, bias=bias, stack=stack, build=build)
        self.o_proj = Linear(q_dim, embed, bias=bias, stack=stack, build=build)

    def __call__(
        self,
        x_BSE: Array,
        cos: Array,
        sin: Array,
        mask_BSS: Array,
        point: DropoutPoint | None,
        prefix_N2KD: Array | None,
    ) -> Array:
        B, S, _ = x_BSE.shape
        q, k, v = (
            self.constrain(
                p(x_BSE, point).reshape(B, S, -1, self.head_dim), ("batch", "seq", p.out_axis, "dim")
            )
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if prefix_N2KD is not None:
            k = in_front(prefix_N2KD[:, 0], k)
            v = in_front(prefix_N2KD[:, 1], v)
        mixed = attend(q, k, v, mask_BSS)
        return self.o_proj(mixed.reshape(B, S, -1), point)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        embed, mlp, bias = Dim("embed", spec.embed), Dim("mlp", spec.mlp), spec.mlp_bias
        self.gate_proj = Linear(embed, mlp, bias=bias, stack=stack, build=build)
        self.up_proj = Linear(embed, mlp, bias=bias, stack=stack, build=build)
        self.down_proj = Linear(mlp, embed, bias=bias, stack=stack, build=build)

    def __call__(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BSE, point)) * self.up_proj(x_BSE, point), point)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a bottleneck adapter stands behind each, where there is one."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        self.input_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, build=build)
        self.self_attn = Attention(spec, stack=stack, build=build)
        self.post_attention_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, build=build)
        self.mlp = SwiGLU(spec, stack=stack, build=build)
        self.attention_adapter: Callable[[Array], Array] | None = None
        self.mlp_adapter: Callable[[Array], Array] | None = None

    def __call__(
        self,
        x_BSE: Array,
        cos: Array,
        sin: Array,
        mask_BSS: Array,
        point: DropoutPoint | None,
        prefix_N2KD: Array | None,
        tap: Tap,
    ) -> Array:
        mixed = self.self_attn(self.input_layernorm(x_BSE), cos, sin, mask_BSS, point, prefix_N2KD)
        if self.attention_adapter is not None:
            mixed = self.attention_adapter(mixed)
        x_BSE = x_BSE + tap("attention", mixed)
        inner = self.mlp(self.post_attention_layernorm(x_BSE), point)
        if self.mlp_adapter is not None:
            inner = self.mlp_adapter(inner)
        return tap("block", x_BSE + tap("mlp", inner))


class Llama(nnx.Module):
    """Token ids [B, S], positions and segments [B, rows of the sequence] to logits [B, rows, vocab]."""

    def __init__(self, spec: ModelSpec, *, remat: str, build: Build) -> None:
        self.spec, self.remat, self.build = spec, remat, build
        self.embed_tokens = Embedding(spec.vocab, spec.embed, build=build)
        self.layers = Block(spec, stack=(spec.layers,), build=build)
        self.norm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=(), build=build)
        embed, vocab = Dim("embed", spec.embed), Dim("vocab", spec.vocab)
        head = None if spec.tied_embeddings else Linear(embed, vocab, bias=False, stack=(), build=build)
        self.lm_head = head
        self.prompt_encoder: Encoder | None = None

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None = None,
        probes: Probes | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and the activations [.., B, rows, ..] at the points that `probes` has (layers in front)."""
        tap, virtual = Tap(probes or {}), self.virtual(None if point is None else point.step)
        x_BSE = self.embed(input_ids, virtual, tap)
        x_BSE, seen = self.blocks(
            x_BSE,
            virtual,
            positions=positions,
            segments=segments,
            point=point,
            probes=probes or {},
        )
        return self.head(x_BSE, point, tap), seen | tap.seen

    def virtual(self, step: Array | None) -> VirtualTokens:
        """The virtual tokens of update `step`, which are the same for every example."""
        return VirtualTokens() if self.prompt_encoder is None else self.prompt_encoder(step)

    def embed(self, input_ids: Array, virtual: VirtualTokens, tap: Tap) -> Array:
        """What the first layer is given, [B, rows, E]."""
        x_BSE = self.embed_tokens(input_ids)
        if virtual.rows is not None:
            x_BSE = in_front(virtual.rows, x_BSE)
        return tap("embedding", x_BSE)

    def blocks(
        self,
        x_BSE: Array,
        virtual: VirtualTokens,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None,
        probes: Probes,
        is_layer: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The stacked layers one after the other, and what was seen in each.

        Where the stack is filled up, `is_layer` [L] says which of it are layers: the others let x pass.
        """
        cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)
        mask_BSS = attention_mask(segments)
        if virtual.prefix is not None:
            seen_by_all = ((0, 0), (0, 0), (virtual.prefix.shape[1], 0))
            mask_BSS = jnp.pad(mask_BSS, seen_by_all, constant_values=True)
        definition, stacked = nnx.split(self.layers)

        def block(
            x_BSE: Array, layer: tuple[nnx.State, Probes, Array | None]
        ) -> tuple[Array, dict[str, Array]]:
            weights, layer_probes, prefix = layer
            inner_tap = Tap(layer_probes)
            x_BSE = nnx.merge(definition, weights)(x_BSE, cos, sin, mask_BSS, point, prefix, inner_tap)
            return x_BSE, inner_tap.seen

        if self.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)

        def place(x_BSE: Array, filled: tuple[Any, Array]) -> tuple[Array, dict[str, Array]]:
            layer, is_layer = filled
            y_BSE, seen = block(x_BSE, layer)
            return jnp.where(is_layer, y_BSE, x_BSE), seen

        layer_probes = {name: probe for name, probe in probes.items() if name in LAYER_POINTS}
        layers = (stacked, layer_probes, virtual.prefix)
        if is_layer is None:
            return lax.scan(block, x_BSE, layers)
        return lax.scan(place, x_BSE, (layers, is_layer))

    def head(self, x_BSE: Array, point: DropoutPoint | None, tap: Tap) -> Array:
        """Logits [B, S, vocab] of what the last layer gives."""
        x_BSE = tap("norm", self.norm(x_BSE))
        logits = self.embed_tokens.attend(x_BSE) if self.lm_head is None else self.lm_head(x_BSE, point)
        return tap("logits", logits)


def attention_mask(segments_BS: Array) -> Array:
    """True [B, S, S] where a query may look: at or before itself, in its own document or at a virtual token. Padding
    (segment 0) sees padding, so no row of the softmax is empty."""
    order = jnp.arange(segments_BS.shape[1])
    is_own = segments_BS[:, :, None] == segments_BS[:, None, :]
    is_virtual = segments_BS[:, None, :] == VIRTUAL
    return (order[:, None] >= order[None, :]) & (is_own | is_virtual)


def build_model(spec: ModelSpec, *, policy: Policy, remat: str, constrain: Constrain) -> Llama:
    """The model as shapes only; `weights.from_canonical` makes the arrays.

    `constrain(x, axes)` says which logical axis each dimension of an activation is; the plan decides what that means.
    """
    return Llama(spec, remat=remat, build=Build(jnp.dtype(COMPUTE_DTYPE[policy]), constrain))
