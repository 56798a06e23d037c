"""Prompt tuning: trained embeddings before those of the tokens.

N virtual tokens, E embed.
"""

from __future__ import annotations

import numpy as np
from flax import nnx
from jax import Array

from jaxtrain.decoder import Decoder
from jaxtrain.layers import Build, VirtualTokens, abstract
from jaxtrain.methods.site import Site
from jaxtrain.weight_ops import read
from trainspec.methods import PromptTuning
from trainspec.model import ModelSpec


class PromptEmbedding(nnx.Module):
    """Trained embeddings (PEFT's PromptEmbedding)."""

    def __init__(self, spec: ModelSpec, method: PromptTuning, *, build: Build) -> None:
        self.embedding = abstract((method.virtual_tokens, spec.embed), build.dtype)
        self.constrain = build.constrain

    def __call__(self, step: Array | None) -> VirtualTokens:
        """A prompt [N, E]."""
        return VirtualTokens(prompt=self.constrain(read(self.embedding.get_value()), ("virtual", "embed")))


def attach(model: Decoder, method: PromptTuning, site: Site) -> dict[str, np.ndarray]:
    """Let `model` put the prompt before its embeddings; returns no constants."""
    model.prompt_tokens = method.virtual_tokens
    model.prompt_encoder = nnx.data(PromptEmbedding(site.spec, method, build=model.build))
    return {}
