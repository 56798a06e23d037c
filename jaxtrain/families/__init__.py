"""The model class of every family, by its name in `trainspec.families`."""

from __future__ import annotations

from jaxtrain.decoder import Decoder
from jaxtrain.families.glm import Glm
from jaxtrain.families.llama import Llama
from jaxtrain.families.mistral import Mistral
from jaxtrain.families.qwen2 import Qwen2
from jaxtrain.families.qwen3 import Qwen3
from jaxtrain.families.smollm3 import SmolLM3

FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "mistral": Mistral,
    "smollm3": SmolLM3,
    "glm": Glm,
    "chatglm2": Glm,
}
