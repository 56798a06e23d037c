"""ChatGLM2-6B (and ChatGLM3-6B, which has the same layout): a GLM whose directory has names and settings of its own.

Queries, keys and values are one matrix in its files. Everything else is GLM: the spec, the table, and so the names of
targets. Sources: arXiv 2210.02414, the published config.json and the shapes of its weights. Code that a directory brings is not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from trainspec.errors import ModelError
from trainspec.families.config import Layers, export_config, validated_fields
from trainspec.families.family import Stored
from trainspec.families.glm import Glm
from trainspec.model import ModelSpec
from trainspec.rope import Positive, RopeFields, Size

Zero = Annotated[float, Field(ge=0, le=0)]


class _Fields(RopeFields):
    """The fields that determine the arithmetic; those of another arithmetic must have the value that leaves it out."""

    model_config = ConfigDict(strict=True, extra="ignore")
    num_layers: Layers
    padded_vocab_size: Size
    hidden_size: Size
    ffn_hidden_size: Size
    kv_channels: Size
    num_attention_heads: Size
    seq_length: Size
    multi_query_group_num: Size
    layernorm_epsilon: Positive = 1e-5
    add_qkv_bias: bool = False
    tie_word_embeddings: bool | None = None
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    # Without it, rows of queries, keys and values are dealt head by head.
    multi_query_attention: Literal[True]
    rmsnorm: Literal[True] = True
    post_layer_norm: Literal[True] = True
    original_rope: Literal[True] = True
    add_bias_linear: Literal[False] = False
    apply_residual_connection_post_layernorm: Literal[False] = False
    fp32_residual_connection: Literal[False] = False
    hidden_dropout: Zero = 0
    attention_dropout: Zero = 0
    # A scaled rotation, in two meanings: the 32k variants of ChatGLM2 and ChatGLM3 differ.
    rope_ratio: Annotated[float, Field(ge=1, le=1)] | None = None
    # A prefix encoder or rounded weights in the same file.
    pre_seq_len: None = None
    quantization_bit: Zero | None = None


# The names in its files, with those of the table; `N` is the layer.
_NAMES = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.layers.N.input_layernorm": "transformer.encoder.layers.N.input_layernorm",
    "model.layers.N.self_attn.o_proj": "transformer.encoder.layers.N.self_attention.dense",
    "model.layers.N.post_attention_layernorm": "transformer.encoder.layers.N.post_attention_layernorm",
    "model.layers.N.mlp.gate_up_proj": "transformer.encoder.layers.N.mlp.dense_h_to_4h",
    "model.layers.N.mlp.down_proj": "transformer.encoder.layers.N.mlp.dense_4h_to_h",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}
_FUSED = "transformer.encoder.layers.N.self_attention.query_key_value"
_QKV = re.compile(r"self_attn\.([qkv])_proj$")
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


class ChatGLM2(Glm):
    """Models of ChatGLM2's `ChatGLMForConditionalGeneration`, as GLMs."""

    name = "chatglm2"
    title = "ChatGLM2"
    model_type = "chatglm"
    architectures = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
    derived: ClassVar[tuple[str, ...]] = ("transformer.rotary_pos_emb.inv_freq",)
    peft_targets: ClassVar[tuple[str, ...] | None] = ("query_key_value",)
    published_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "query_key_value": ("q_proj", "k_proj", "v_proj"),
        "dense": ("o_proj",),
        "dense_h_to_4h": ("gate_up_proj",),
        "dense_4h_to_h": ("down_proj",),
    }
    # Sizes of the published model (its config.json).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        "chatglm2-6b": ModelSpec(
            name="chatglm2-6b", vocab=65024, embed=4096, layers=28, heads=32, kv_heads=2, head_dim=128, mlp=13696,
            norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=32768, tied_embeddings=False,
            attention_bias=True, mlp_bias=False, init_std=0.02, family="chatglm2", rotary_share=0.5,
        )
    }  # fmt: skip

    def stored(self, name: str) -> Stored:
        """The names of its own files; queries, keys and values stand one below the other."""
        if name in self.derived:
            return Stored(name)
        layer = _LAYER.search(name)
        module, _, leaf = (_LAYER.sub("N", name) if layer else name).rpartition(".")
        if qkv := _QKV.search(module):
            found = Stored(f"{_FUSED}.{leaf}", "qkv".index(qkv[1]), 3)
        else:
            whole = _NAMES.get(f"{module}.{leaf}")
            found = Stored(whole or f"{_NAMES[module]}.{leaf}")
        return found._replace(name=found.name.replace("N", layer[0])) if layer else found

    def spec_of(self, config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
        """See the base class; fields mean what the published code takes them to mean."""
        f = validated_fields(_Fields, config, where)
        if f.num_attention_heads % f.multi_query_group_num:
            raise ModelError(
                f"{where}: num_attention_heads {f.num_attention_heads} is not a multiple of multi_query_group_num "
                f"{f.multi_query_group_num}"
            )
        if f.kv_channels % 4:
            raise ModelError(
                f"{where}: kv_channels {f.kv_channels} is not a multiple of 4; half of a head is turned, in pairs"
            )
        return ModelSpec(
            name=name,
            vocab=f.padded_vocab_size,
            embed=f.hidden_size,
            layers=f.num_layers,
            heads=f.num_attention_heads,
            kv_heads=f.multi_query_group_num,
            head_dim=f.kv_channels,
            mlp=f.ffn_hidden_size,
            norm_eps=f.layernorm_epsilon,
            rope_theta=1e4,
            rope_scaling=None,
            max_positions=f.seq_length,
            tied_embeddings=bool(f.tie_word_embeddings),
            attention_bias=f.add_qkv_bias,
            mlp_bias=False,
            init_std=f.initializer_range,
            family=self.name,
            rotary_share=0.5,
        )

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Every field that `spec_of` reads, but those of another arithmetic."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_layers": model.layers,
            "padded_vocab_size": model.vocab,
            "hidden_size": model.embed,
            "ffn_hidden_size": model.mlp,
            "kv_channels": model.head_dim,
            "num_attention_heads": model.heads,
            "seq_length": model.max_positions,
            "multi_query_attention": True,
            "multi_query_group_num": model.kv_heads,
            "layernorm_epsilon": model.norm_eps,
            "add_qkv_bias": model.attention_bias,
            "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True,
            "original_rope": True,
            "tie_word_embeddings": model.tied_embeddings,
            "initializer_range": model.init_std,
        }

    def notes(self, config: dict[str, Any], *, where: str) -> list[str]:
        """That the directory's own code is not run."""
        validated_fields(_Fields, config, where)
        code = "auto_map names code of the model's own, which is not run: the model is trained as transformers' GLM"
        return [code] if config.get("auto_map") else []

    def export_config(self, config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
        """See the base class."""
        return export_config(config, model)
