"""Qwen2 and Qwen2.5: Hugging Face's Qwen2ForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from torchtrain.families.llama import Llama, sizes
from trainspec.model import ModelSpec


class Qwen2(Llama):
    """Llama's anatomy."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (Qwen2RMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        return Qwen2ForCausalLM(Qwen2Config(**sizes(spec)))
