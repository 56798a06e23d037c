"""Llama: rotary grouped-query attention and SwiGLU, each after an RMS norm (arXiv 2302.13971, 2307.09288, 2407.21783)."""

# P prompt tokens, E embed, H query heads, K kv heads, G query heads per kv head, D head dim, L layers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainspec.entry import Normal, Ones, Param, Role, Zeros
from trainspec.errors import ModelError
from trainspec.families.config import DecoderFields, decoder_notes, export_config, validated_fields
from trainspec.families.family import Family
from trainspec.model import ModelSpec
from trainspec.rope import Llama3Scaling, inverse_frequencies, rope_parameters, table_factor
from trainspec.weight import Weight

Array = NDArray[Any]


def _preset(
    name: str, sizes: tuple[int, ...], *, theta: float = 1e4, positions: int = 4096, **rules: Any
) -> ModelSpec:
    vocab, embed, layers, heads, kv_heads, mlp = sizes
    spec = ModelSpec(
        name=name, vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=embed // heads,
        mlp=mlp, norm_eps=1e-5, rope_theta=theta, rope_scaling=None, max_positions=positions, tied_embeddings=False,
        attention_bias=False, mlp_bias=False, init_std=0.02,
    )  # fmt: skip
    return replace(spec, **rules)


def _llama3(factor: float) -> dict[str, Any]:
    """The rotation of Llama 3.1 and 3.2."""
    return {"theta": 5e5, "positions": 131072, "rope_scaling": Llama3Scaling(factor, 1.0, 4.0, 8192)}


class Llama(Family):
    """Models of `LlamaForCausalLM`."""

    name = "llama"
    title = "Llama"
    model_type = "llama"
    peft_targets: ClassVar[tuple[str, ...] | None] = ("q_proj", "v_proj")
    # The second spelling is that of checkpoints converted before transformers 4.28.
    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    fields: ClassVar[type[DecoderFields]] = DecoderFields
    # Rules of the spec that no setting changes.
    fixed: ClassVar[Mapping[str, bool]] = {}
    # Whether transformers' configuration refuses heads that do not divide the hidden size.
    heads_divide: ClassVar[bool] = True
    # Whether attention's output has a bias where queries, keys and values have one.
    output_bias: ClassVar[bool] = True
    within_layer: ClassVar[tuple[str, ...]] = (
        "input_layernorm", "input_norm", "q_proj", "query", "k_proj", "key", "v_proj", "value",
        "rotated_query", "rotated_key", "prefix_key", "prefix_value", "mixed", "o_proj", "attention_adapter", "attention",
        "post_attention_layernorm", "post_norm", "gate_proj", "gate", "up_proj", "up", "product", "down_proj", "mlp_adapter",
        "mlp", "block",
    )  # fmt: skip
    stream_readers: ClassVar[tuple[str, ...]] = ("input_layernorm", "q_proj", "k_proj", "v_proj")
    # Sizes of published models: Llama 2 (arXiv 2307.09288), Llama 3 and 3.1 (arXiv 2407.21783), Llama 3.2 (its model card).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        spec.name: spec
        for spec in (
            _preset("tiny", (512, 64, 2, 4, 2, 128), positions=512),
            _preset("llama2-7b", (32000, 4096, 32, 32, 32, 11008)),
            _preset("llama2-13b", (32000, 5120, 40, 40, 40, 13824)),
            _preset("llama2-70b", (32000, 8192, 80, 64, 8, 28672)),
            _preset("llama3-8b", (128256, 4096, 32, 32, 8, 14336), theta=5e5, positions=8192),
            _preset("llama3-70b", (128256, 8192, 80, 64, 8, 28672), theta=5e5, positions=8192),
            _preset("llama3.1-8b", (128256, 4096, 32, 32, 8, 14336), **_llama3(8.0)),
            _preset("llama3.1-70b", (128256, 8192, 80, 64, 8, 28672), **_llama3(8.0)),
            _preset("llama3.2-1b", (128256, 2048, 16, 32, 8, 8192), tied_embeddings=True, **_llama3(32.0)),
            _preset("llama3.2-3b", (128256, 3072, 28, 24, 8, 8192), tied_embeddings=True, **_llama3(32.0)),
        )
    }

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """Embedding, layers, final norm and, unless tied, the head."""
        ends = (model.vocab, model.embed), ("vocab", "embed")
        entries = [matrix(self.embedding.removesuffix(".weight"), "embedding", model, *ends, None)]
        for i in range(model.layers):
            entries += self.layer(model, i)
        entries.append(norm("model.norm", (model.embed, "embed"), None))
        if not model.tied_embeddings:
            entries.append(matrix(self.head.removesuffix(".weight"), "head", model, *ends, None))
        return tuple(entries)

    def layer(self, m: ModelSpec, i: int) -> list[Param]:
        """The weights of layer `i`."""
        base = f"model.layers.{i}"
        q_size, kv_size = m.heads * m.head_dim, m.kv_heads * m.head_dim
        attention: tuple[Linear, ...] = (
            ("self_attn.q_proj", (q_size, m.embed), ("heads", "embed"), m.attention_bias),
            ("self_attn.k_proj", (kv_size, m.embed), ("kv_heads", "embed"), m.attention_bias),
            ("self_attn.v_proj", (kv_size, m.embed), ("kv_heads", "embed"), m.attention_bias),
            (
                "self_attn.o_proj",
                (m.embed, q_size),
                ("embed", "heads"),
                m.attention_bias and self.output_bias,
            ),
        )
        entries = [norm(f"{base}.input_layernorm", (m.embed, "embed"), i)]
        entries += [entry for one in attention for entry in linear(base, m, one, i)]
        entries.append(norm(f"{base}.post_attention_layernorm", (m.embed, "embed"), i))
        return entries + [entry for one in self.feed_forward(m) for entry in linear(base, m, one, i)]

    def feed_forward(self, m: ModelSpec) -> tuple[Linear, ...]:
        """The linear layers of the feed-forward block."""
        return (
            ("mlp.gate_proj", (m.mlp, m.embed), ("mlp", "embed"), m.mlp_bias),
            ("mlp.up_proj", (m.mlp, m.embed), ("mlp", "embed"), m.mlp_bias),
            ("mlp.down_proj", (m.embed, m.mlp), ("embed", "mlp"), m.mlp_bias),
        )

    def spec_of(self, config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
        """See the base class; fields mean what transformers 5 takes them to mean."""
        fields = validated_fields(self.fields, config, where)
        self.check(fields, where)
        return replace(fields.spec(self.name, name=name, where=where), **self.rules(fields))

    def check(self, fields: DecoderFields, where: str) -> None:
        """Raises ModelError for fields that transformers' configuration of this family refuses."""
        if self.heads_divide and fields.hidden_size % fields.num_attention_heads:
            raise ModelError(
                f"{where}: hidden_size {fields.hidden_size} is not a multiple of num_attention_heads "
                f"{fields.num_attention_heads}"
            )

    def rules(self, fields: Any) -> dict[str, Any]:
        """The rules of the spec that are this family's own, from `fields`, which are of its class."""
        return dict(self.fixed)

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Every field that `spec_of` reads, but those that are always the same in this family."""
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab,
            "hidden_size": model.embed,
            "intermediate_size": model.mlp,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "rope_parameters": rope_parameters(model),
            "max_position_embeddings": model.max_positions,
            "tie_word_embeddings": model.tied_embeddings,
            "attention_bias": model.attention_bias,
            "mlp_bias": model.mlp_bias,
            "initializer_range": model.init_std,
        }
        return {key: value for key, value in config.items() if key not in self.fixed}

    def notes(self, config: dict[str, Any], *, where: str) -> list[str]:
        """Unused rotary settings and biases, custom code, a padding token out of range."""
        fields = validated_fields(self.fields, config, where)
        return decoder_notes(config, fields, title=self.title, where=where) + [
            f"{key} {str(config[key]).lower()} is not used: a {self.title} always has the other"
            for key, value in self.fixed.items()
            if config.get(key) not in (None, value)
        ]

    def export_config(self, config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
        """See the base class; nulls that transformers 5 refuses are left out."""
        return export_config(config, model, fields=self.fields)

    def keys_and_values(self, model: ModelSpec, weights: Mapping[str, Weight], ids: Sequence[int]) -> Array:
        """See the base class; stops at the keys and values of the last layer."""
        x_PE = self.embedded(weights, ids)
        turns = np.arange(len(ids))[:, None] * inverse_frequencies(model, np.float64)
        angles_P1R = np.concatenate([turns, turns], axis=-1)[:, None, :]
        tables = np.cos(angles_P1R) * table_factor(model), np.sin(angles_P1R) * table_factor(model)
        result = np.empty((len(ids), 2 * model.layers, model.kv_heads, model.head_dim))
        for i in range(model.layers):
            layer = LayerWeights(model, weights, f"model.layers.{i}")
            normed = layer.norm("input_layernorm", x_PE)
            q, k, v = (self.heads(layer, name, normed) for name in "qkv")
            if i not in model.unrotated:
                q, k = self.rotate(q, *tables), self.rotate(k, *tables)
            result[:, 2 * i], result[:, 2 * i + 1] = k, v
            if i + 1 == model.layers:
                return result
            x_PE = x_PE + layer.linear(
                "self_attn.o_proj", _attend(q, k, v, model.window).reshape(len(ids), -1)
            )
            x_PE = x_PE + self.mlp(layer, layer.norm("post_attention_layernorm", x_PE))
        return result

    def heads(self, layer: LayerWeights, name: str, x_PE: Array) -> Array:
        """Queries, keys or values (`name` q, k or v) before rotation, [P, H, D] or [P, K, D]."""
        return layer.linear(f"self_attn.{name}_proj", x_PE).reshape(len(x_PE), -1, layer.head_dim)

    def rotate(self, x_PHD: Array, cos_P1R: Array, sin_P1R: Array) -> Array:
        """The rotary embedding of queries or keys."""
        first, second = np.split(x_PHD, 2, axis=-1)
        return x_PHD * cos_P1R + np.concatenate([-second, first], axis=-1) * sin_P1R

    def mlp(self, layer: LayerWeights, x_PE: Array) -> Array:
        """down(silu(gate(x)) * up(x))."""
        gate = layer.linear("mlp.gate_proj", x_PE)
        return layer.linear("mlp.down_proj", silu(gate) * layer.linear("mlp.up_proj", x_PE))


# The name in a layer of a linear layer, its shape [out, in] with logical axes, and whether it has a bias.
Linear = tuple[str, tuple[int, int], tuple[str, str], bool]


def linear(base: str, m: ModelSpec, one: Linear, i: int) -> list[Param]:
    """The entries of a linear layer of layer `i`, whose name is `base`."""
    name, shape, axes, bias = one
    entries = [matrix(f"{base}.{name}", "linear", m, shape, axes, i)]
    if bias:
        entries.append(Param(f"{base}.{name}.bias", shape[:1], axes[:1], Zeros(), False, "linear", i))
    return entries


def matrix(
    module: str, role: Role, m: ModelSpec, shape: tuple[int, int], axes: tuple[str, str], layer: int | None
) -> Param:
    """The entry of a weight [out, in], initialized from a normal distribution."""
    return Param(f"{module}.weight", shape, axes, Normal(m.init_std), True, role, layer)


def norm(module: str, dim: tuple[int, str], layer: int | None) -> Param:
    """The entry of a norm over the dimension `dim`, as (size, logical axis)."""
    return Param(f"{module}.weight", dim[:1], dim[1:], Ones(), False, "norm", layer)


class LayerWeights:
    """The functions of one layer; a weight is in memory only while it is used."""

    def __init__(self, model: ModelSpec, weights: Mapping[str, Weight], base: str) -> None:
        self.head_dim, self._eps = model.head_dim, model.norm_eps
        self._weights, self._base = weights, base

    def norm(self, module: str, x: Array) -> Array:
        """RMS norm over the last dimension."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps) * self._read(f"{module}.weight")

    def linear(self, module: str, x: Array) -> Array:
        """x W^T, plus the bias where there is one."""
        y = x @ self._read(f"{module}.weight").T
        has_bias = f"{self._base}.{module}.bias" in self._weights
        return y + self._read(f"{module}.bias") if has_bias else y

    def _read(self, name: str) -> Array:
        return self._weights[f"{self._base}.{name}"][...].astype(np.float64)


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), in a form that never overflows."""
    return x * (0.5 * (1.0 + np.tanh(0.5 * x)))


def _attend(q_PHD: Array, k_PKD: Array, v_PKD: Array, window: int | None) -> Array:
    P, H, D = q_PHD.shape
    grouped = q_PHD.reshape(P, k_PKD.shape[1], -1, D)
    scores = np.einsum("qkgd,skd->kgqs", grouped, k_PKD) / np.sqrt(D)
    visible = np.tril(np.ones((P, P), bool))
    if window is not None:
        visible = np.triu(visible, 1 - window)
    scores = np.where(visible, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("kgqs,skd->qkgd", shares, v_PKD).reshape(P, H, D)
