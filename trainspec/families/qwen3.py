"""Qwen3: Llama with an RMS norm of every query and key head before the rotation (arXiv 2505.09388)."""

# P prompt tokens, E embed, H query heads, K kv heads, D head dim

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from trainspec.entry import Param
from trainspec.families.config import DecoderFields
from trainspec.families.llama import Array, LayerWeights, Llama, norm
from trainspec.model import ModelSpec
from trainspec.rope import Size


class _Fields(DecoderFields):
    """Defaults are those of transformers' Qwen3Config."""

    num_key_value_heads: Size | None = 32
    head_dim: Size = 128  # pyright: ignore[reportIncompatibleVariableOverride] (it cannot be null)
    max_position_embeddings: Size = 32768
    # Sliding windows are not supported; a window size without the switch is not used.
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None


def _preset(name: str, sizes: tuple[int, ...], *, tied: bool) -> ModelSpec:
    embed, layers, heads, mlp = sizes
    return ModelSpec(
        name=name, vocab=151936, embed=embed, layers=layers, heads=heads, kv_heads=8, head_dim=128, mlp=mlp,
        norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_positions=40960, tied_embeddings=tied,
        attention_bias=False, mlp_bias=False, init_std=0.02, family="qwen3",
    )  # fmt: skip


class Qwen3(Llama):
    """Models of `Qwen3ForCausalLM`, without a sliding window."""

    name = "qwen3"
    title = "Qwen3"
    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    fields: ClassVar[type[DecoderFields]] = _Fields
    heads_divide: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, bool]] = {"mlp_bias": False}
    within_layer: ClassVar[tuple[str, ...]] = (
        "input_layernorm", "input_norm", "q_proj", "query", "k_proj", "key", "v_proj", "value",
        "q_norm", "query_norm", "k_norm", "key_norm", "rotated_query", "rotated_key", "prefix_key", "prefix_value", "mixed",
        "o_proj", "attention_adapter", "attention", "post_attention_layernorm", "post_norm", "gate_proj", "gate",
        "up_proj", "up", "product", "down_proj", "mlp_adapter", "mlp", "block",
    )  # fmt: skip
    # Sizes of published models (arXiv 2505.09388, table 1).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        spec.name: spec
        for spec in (
            _preset("qwen3-0.6b", (1024, 28, 16, 3072), tied=True),
            _preset("qwen3-1.7b", (2048, 28, 16, 6144), tied=True),
            _preset("qwen3-4b", (2560, 36, 32, 9728), tied=True),
            _preset("qwen3-8b", (4096, 36, 32, 12288), tied=False),
            _preset("qwen3-32b", (5120, 64, 64, 25600), tied=False),
        )
    }

    def layer(self, m: ModelSpec, i: int) -> list[Param]:
        """Llama's, plus a norm for all query heads and one for all key heads."""
        entries, base = super().layer(m, i), f"model.layers.{i}.self_attn"
        before = [entry.module for entry in entries].index(f"{base}.o_proj")
        entries[before:before] = [
            norm(f"{base}.{name}", (m.head_dim, "head_dim"), i) for name in ("q_norm", "k_norm")
        ]
        return entries

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Llama's, without a sliding window."""
        return super().config_of(model) | {"use_sliding_window": False}

    def heads(self, layer: LayerWeights, name: str, x_PE: Array) -> Array:
        """Llama's, with queries and keys normed."""
        heads_PHD = super().heads(layer, name, x_PE)
        return heads_PHD if name == "v" else layer.norm(f"self_attn.{name}_norm", heads_PHD)
