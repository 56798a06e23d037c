"""SmolLM3: Hugging Face's SmolLM3ForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from torchtrain.families.llama import Llama, sizes
from trainspec.model import ModelSpec


class SmolLM3(Llama):
    """Llama's anatomy. An attention knows whether it rotates."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (SmolLM3RMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        rotates = [int(i not in spec.unrotated) for i in range(spec.layers)]
        return SmolLM3ForCausalLM(
            SmolLM3Config(**sizes(spec), mlp_bias=spec.mlp_bias, no_rope_layers=rotates)
        )
