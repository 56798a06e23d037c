"""SmolLM3: Llama; the decoder gives the layers that do not rotate tables that turn nothing."""

from __future__ import annotations

from jaxtrain.families.llama import Llama


class SmolLM3(Llama):
    """The whole model."""
