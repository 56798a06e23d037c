"""Llama: rotary grouped-query attention and SwiGLU, each after an RMS norm.

B batch, S sequence (with the virtual tokens of a prompt), E embed, H query heads, K kv heads, D head dim, N virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from flax import nnx
from jax import Array

from jaxtrain.activations import tap
from jaxtrain.attention.one_token import OneToken
from jaxtrain.attention.visible import Visible
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import (
    Build,
    Dim,
    Embedding,
    KeysValues,
    Linear,
    RMSNorm,
    in_front,
    repeated,
    rotate,
    swiglu,
)
from jaxtrain.rounding import rounded
from trainspec.model import ModelSpec


class Attention(nnx.Module):
    """Rotary grouped-query self-attention, and the keys and values that it saw."""

    # Whether the output has a bias where queries, keys and values have one.
    output_bias: ClassVar[bool] = True

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        embed = Dim("embed", spec.embed)
        q_dim = Dim("heads", spec.heads * spec.head_dim)
        kv_dim = Dim("kv_heads", spec.kv_heads * spec.head_dim)
        bias = spec.attention_bias
        self.head_dim, self.constrain, self.attend = spec.head_dim, build.constrain, build.attend
        self.q_proj = Linear(embed, q_dim, bias=bias, stack=stack, build=build)
        self.k_proj = Linear(embed, kv_dim, bias=bias, stack=stack, build=build)
        self.v_proj = Linear(embed, kv_dim, bias=bias, stack=stack, build=build)
        self.o_proj = Linear(q_dim, embed, bias=bias and self.output_bias, stack=stack, build=build)
        self.prefix_dropout: Callable[[Array, Array, DropoutPoint], tuple[Array, Array]] | None = None

    def __call__(
        self,
        x_BSE: Array,
        cos: Array,
        sin: Array,
        visible: Visible | OneToken,
        point: DropoutPoint | None,
        prefix_N2KD: Array | None,
    ) -> tuple[Array, KeysValues]:
        B, S, _ = x_BSE.shape
        q, k, v = (
            self.constrain(
                p(x_BSE, point).reshape(B, S, -1, self.head_dim), ("batch", "seq", p.out_axis, "dim")
            )
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = tap("query", q), tap("key", k), tap("value", v)
        rotate = self.rotate
        q, k = self.before_rotation(q, k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k = tap("rotated_query", q), tap("rotated_key", k)
        if prefix_N2KD is not None:
            keys, values = repeated(prefix_N2KD[:, 0], k), repeated(prefix_N2KD[:, 1], v)
            if self.prefix_dropout is not None and point is not None:
                keys, values = self.prefix_dropout(keys, values, point)
            k, v = in_front(tap("prefix_key", keys), k), in_front(tap("prefix_value", values), v)
        if isinstance(visible, OneToken):
            k, v = visible.with_own(k, v)
        mixed = tap("mixed", self.attend(q, k, v, visible))
        return self.o_proj(mixed.reshape(B, S, -1), point), KeysValues(k, v)

    def rotate(self, x_BSHD: Array, cos: Array, sin: Array) -> Array:
        """The rotary embedding of queries or keys."""
        return rotate(x_BSHD, cos, sin)

    def before_rotation(self, q_BSHD: Array, k_BSKD: Array) -> tuple[Array, Array]:
        """Queries and keys as they are rotated: Llama's are the projections, unchanged."""
        return q_BSHD, k_BSKD


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        embed, mlp, bias = Dim("embed", spec.embed), Dim("mlp", spec.mlp), spec.mlp_bias
        self.gate_proj = Linear(embed, mlp, bias=bias, stack=stack, build=build)
        self.up_proj = Linear(embed, mlp, bias=bias, stack=stack, build=build)
        self.down_proj = Linear(mlp, embed, bias=bias, stack=stack, build=build)

    def __call__(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        gate, up = tap("gate", self.gate_proj(x_BSE, point)), tap("up", self.up_proj(x_BSE, point))
        product = tap("product", swiglu(gate, up))
        return self.down_proj(product, point)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a bottleneck adapter, if there is one, follows attention and mlp.

    The keys and values that attention saw are returned beside it.
    """

    attention: ClassVar[type[Attention]] = Attention
    feed_forward: ClassVar[type[SwiGLU]] = SwiGLU

    def __init__(self, spec: ModelSpec, *, stack: tuple[int, ...], build: Build) -> None:
        self.input_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, build=build)
        self.self_attn = self.attention(spec, stack=stack, build=build)
        self.post_attention_layernorm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=stack, build=build)
        self.mlp = self.feed_forward(spec, stack=stack, build=build)
        self.attention_adapter: Callable[[Array], Array] | None = None
        self.mlp_adapter: Callable[[Array], Array] | None = None

    def __call__(
        self,
        x_BSE: Array,
        cos: Array,
        sin: Array,
        visible: Visible | OneToken,
        point: DropoutPoint | None,
        prefix_N2KD: Array | None,
    ) -> tuple[Array, KeysValues]:
        normed = tap("input_norm", self.input_layernorm(x_BSE))
        mixed, seen = self.self_attn(normed, cos, sin, visible, point, prefix_N2KD)
        if self.attention_adapter is not None:
            mixed = self.attention_adapter(mixed)
        x_BSE = rounded(x_BSE + tap("attention", mixed))
        inner = self.mlp(tap("post_norm", self.post_attention_layernorm(x_BSE)), point)
        if self.mlp_adapter is not None:
            inner = self.mlp_adapter(inner)
        return tap("block", rounded(x_BSE + tap("mlp", inner))), seen


class Llama(Decoder):
    """The whole model; its attributes have the names of the weights."""

    block: ClassVar[type[Block]] = Block

    def __init__(self, spec: ModelSpec, *, remat: str, build: Build) -> None:
        super().__init__(spec, remat=remat, build=build)
        self.embed_tokens = Embedding(spec.vocab, spec.embed, build=build)
        self.layers = self.block(spec, stack=(spec.layers,), build=build)
        self.norm = RMSNorm(spec.embed, eps=spec.norm_eps, stack=(), build=build)
        embed, vocab = Dim("embed", spec.embed), Dim("vocab", spec.vocab)
        head = None if spec.tied_embeddings else Linear(embed, vocab, bias=False, stack=(), build=build)
        self.lm_head = head

    def look_up(self, input_ids: Array) -> Array:
        return self.embed_tokens(input_ids)

    def drop_prefix(self, dropout: nnx.Module) -> str:
        self.layers.self_attn.prefix_dropout = nnx.data(dropout)
        return "layers.self_attn.prefix_dropout"

    def normed(self, x_BSE: Array) -> Array:
        return self.norm(x_BSE)

    def head_layer(self) -> Embedding | Linear:
        return self.embed_tokens if self.lm_head is None else self.lm_head
