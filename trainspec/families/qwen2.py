"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values (arXiv 2407.10671, 2412.15115)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from trainspec.families.config import DecoderFields
from trainspec.families.llama import Llama
from trainspec.model import ModelSpec
from trainspec.rope import Size


class _Fields(DecoderFields):
    """Defaults are those of transformers' Qwen2Config."""

    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768
    # Its windows are of the last layers only, and are not supported; a size without the switch is not used.
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None


def _preset(name: str, sizes: tuple[int, ...], *, tied: bool, positions: int) -> ModelSpec:
    vocab, embed, layers, heads, kv_heads, mlp = sizes
    return ModelSpec(
        name=name, vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=embed // heads,
        mlp=mlp, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_positions=positions, tied_embeddings=tied,
        attention_bias=True, mlp_bias=False, init_std=0.02, family="qwen2",
    )  # fmt: skip


class Qwen2(Llama):
    """Models of `Qwen2ForCausalLM`, without a sliding window."""

    name = "qwen2"
    title = "Qwen2"
    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    fields: ClassVar[type[DecoderFields]] = _Fields
    heads_divide: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, bool]] = {"attention_bias": True, "mlp_bias": False}
    output_bias: ClassVar[bool] = False
    # Sizes of published models (arXiv 2412.15115, table 1).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        spec.name: spec
        for spec in (
            _preset("qwen2.5-0.5b", (151936, 896, 24, 14, 2, 4864), tied=True, positions=32768),
            _preset("qwen2.5-7b", (152064, 3584, 28, 28, 4, 18944), tied=False, positions=131072),
        )
    }

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Llama's, without a sliding window."""
        return super().config_of(model) | {"use_sliding_window": False}
