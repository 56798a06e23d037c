"""The model class of every family, by its name in `trainspec.families`."""

from __future__ import annotations

from jaxtrain.decoder import Decoder
from jaxtrain.families.llama import Llama
from jaxtrain.families.qwen3 import Qwen3

FAMILIES: dict[str, type[Decoder]] = {"llama": Llama, "qwen3": Qwen3}
