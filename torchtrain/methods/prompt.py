"""Prompt tuning: PEFT's embedding of virtual tokens as a child of the model."""

from __future__ import annotations

import torch
from peft import PromptEmbedding, PromptTuningConfig
from transformers import PreTrainedModel

from torchtrain.methods.site import Site
from torchtrain.methods.virtual_tokens import put_in_front
from trainspec.methods import PromptTuning


def attach(model: PreTrainedModel, method: PromptTuning, site: Site) -> None:
    """Put the trained embeddings before those of the tokens; they are on the meta device."""
    with torch.device("meta"):
        config = PromptTuningConfig(
            num_virtual_tokens=method.virtual_tokens, token_dim=site.spec.embed, num_transformer_submodules=1
        )
        encoder = PromptEmbedding(config, None)
    put_in_front(model, encoder, method.virtual_tokens)
