"""GLM: Hugging Face's GlmForCausalLM."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.models.glm.modeling_glm import GlmRMSNorm

from torchtrain.families.llama import Llama, sizes
from trainspec.model import ModelSpec


class Glm(Llama):
    """Llama's anatomy. It takes the size of the rotated part from the tables."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (GlmRMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        return GlmForCausalLM(GlmConfig(**sizes(spec)))

    def before_product(self, mlp: Any) -> dict[str, Any]:
        """None: gate and up are the output of one module."""
        return {}
