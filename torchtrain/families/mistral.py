"""Mistral: Hugging Face's MistralForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from torchtrain.families.llama import Llama, sizes
from trainspec.model import ModelSpec


class Mistral(Llama):
    """Llama's anatomy."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (MistralRMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        # Without its window, which is in the mask that every layer is given.
        return MistralForCausalLM(MistralConfig(**sizes(spec), sliding_window=None))
