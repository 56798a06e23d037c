"""GLM (GLM-4-9B): Llama that rotates pairs of neighbours in a part of each head, with gate and up in one matrix.

Sources: arXiv 2406.12793; transformers' `GlmForCausalLM`.
"""

# P prompt tokens, E embed, H heads, D head dim, R rotated elements of a head

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from trainspec.families.config import DecoderFields
from trainspec.families.llama import Array, LayerWeights, Linear, Llama, silu
from trainspec.model import ModelSpec
from trainspec.rope import Positive, Size


class _Fields(DecoderFields):
    """Defaults are those of transformers' GlmConfig."""

    default_share: ClassVar[float | None] = 0.5
    num_key_value_heads: Size | None = 2
    head_dim: Size | None = 128
    max_position_embeddings: Size = 131072
    rms_norm_eps: Positive = 1.5625e-7
    attention_bias: bool | None = True


class Glm(Llama):
    """Models of `GlmForCausalLM`."""

    name = "glm"
    title = "GLM"
    model_type = "glm"
    peft_targets: ClassVar[tuple[str, ...] | None] = None
    architectures = ("GlmForCausalLM",)
    fields: ClassVar[type[DecoderFields]] = _Fields
    heads_divide: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, bool]] = {"mlp_bias": False}
    output_bias: ClassVar[bool] = False
    within_layer: ClassVar[tuple[str, ...]] = (
        "input_layernorm", "input_norm", "q_proj", "query", "k_proj", "key", "v_proj", "value",
        "rotated_query", "rotated_key", "prefix_key", "prefix_value", "mixed", "o_proj", "attention_adapter", "attention",
        "post_attention_layernorm", "post_norm", "gate_up_proj", "product", "down_proj", "mlp_adapter", "mlp", "block",
    )  # fmt: skip
    # Sizes of the published model (arXiv 2406.12793; its config.json).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        "glm-4-9b": ModelSpec(
            name="glm-4-9b", vocab=151552, embed=4096, layers=40, heads=32, kv_heads=2, head_dim=128, mlp=13696,
            norm_eps=1.5625e-7, rope_theta=1e4, rope_scaling=None, max_positions=8192, tied_embeddings=False,
            attention_bias=True, mlp_bias=False, init_std=0.02, family="glm", rotary_share=0.5,
        )
    }  # fmt: skip

    def feed_forward(self, m: ModelSpec) -> tuple[Linear, ...]:
        """Gate and up are one layer, gate first."""
        return (
            ("mlp.gate_up_proj", (2 * m.mlp, m.embed), ("gate_up", "embed"), False),
            ("mlp.down_proj", (m.embed, m.mlp), ("embed", "mlp"), False),
        )

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Llama's; the default padding token is beyond small vocabularies."""
        return super().config_of(model) | {"pad_token_id": None}

    def rotate(self, x_PHD: Array, cos_P1R: Array, sin_P1R: Array) -> Array:
        """Elements 2j and 2j + 1 turn together; those after the first R stay."""
        pairs = cos_P1R.shape[-1] // 2
        cos, sin = cos_P1R[..., :pairs], sin_P1R[..., :pairs]
        even, odd = x_PHD[..., 0 : 2 * pairs : 2], x_PHD[..., 1 : 2 * pairs : 2]
        turned = x_PHD.copy()
        turned[..., 0 : 2 * pairs : 2] = even * cos - odd * sin
        turned[..., 1 : 2 * pairs : 2] = odd * cos + even * sin
        return turned

    def mlp(self, layer: LayerWeights, x_PE: Array) -> Array:
        """Llama's, from one matrix."""
        gate, up = np.split(layer.linear("mlp.gate_up_proj", x_PE), 2, axis=-1)
        return layer.linear("mlp.down_proj", silu(gate) * up)
