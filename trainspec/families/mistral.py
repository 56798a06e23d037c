"""Mistral: Llama whose queries see a window of positions, where the config has one (arXiv 2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trainspec.families.config import DecoderFields
from trainspec.families.llama import Llama
from trainspec.model import ModelSpec
from trainspec.rope import Size


class _Fields(DecoderFields):
    """Defaults are those of transformers' MistralConfig."""

    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 131072
    sliding_window: Size | None = 4096
    # transformers' Mistral has one window for all layers, and names other families for what has several.
    layer_types: None = None


class Mistral(Llama):
    """Models of `MistralForCausalLM`."""

    name = "mistral"
    title = "Mistral"
    model_type = "mistral"
    architectures = ("MistralForCausalLM",)
    fields: ClassVar[type[DecoderFields]] = _Fields
    heads_divide: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, bool]] = {"attention_bias": False, "mlp_bias": False}
    # Sizes of the published model: those of 7B (arXiv 2310.06825), with the vocabulary and without the window of v0.3.
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        "mistral-7b-v0.3": ModelSpec(
            name="mistral-7b-v0.3", vocab=32768, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336,
            norm_eps=1e-5, rope_theta=1e6, rope_scaling=None, max_positions=32768, tied_embeddings=False,
            attention_bias=False, mlp_bias=False, init_std=0.02, family="mistral",
        )
    }  # fmt: skip

    def rules(self, fields: Any) -> dict[str, Any]:
        """The window."""
        return super().rules(fields) | {"window": fields.sliding_window}

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Llama's, with the window."""
        return super().config_of(model) | {"sliding_window": model.window}
