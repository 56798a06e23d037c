"""The forward pass of every family of `trainspec.families`, by its name there."""

from __future__ import annotations

from jaxtrain.decoder import Decoder
from jaxtrain.families.llama import Llama
from jaxtrain.families.qwen3 import Qwen3

FAMILIES: dict[str, type[Decoder]] = {"llama": Llama, "qwen3": Qwen3}
