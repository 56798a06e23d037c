"""Mistral: Llama; the window of the spec is in the decoder's mask."""

from __future__ import annotations

from jaxtrain.families.llama import Llama


class Mistral(Llama):
    """The whole model."""
