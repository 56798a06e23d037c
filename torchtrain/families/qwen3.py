"""Qwen3: Hugging Face's Qwen3ForCausalLM."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from torchtrain.families.llama import Llama, sizes
from trainspec.model import ModelSpec


class Qwen3(Llama):
    """Llama's anatomy. Every attention has two more norms."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (Qwen3RMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        return Qwen3ForCausalLM(Qwen3Config(**sizes(spec)))

    def outputs(self, layer: Any) -> dict[str, Any]:
        attention = self.attention(layer)
        return super().outputs(layer) | {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
