"""The torch module of every family of `trainspec.families`, by its name there."""

from __future__ import annotations

from typing import Any

from torchtrain.families.anatomy import Anatomy
from torchtrain.families.glm import Glm
from torchtrain.families.llama import Llama
from torchtrain.families.mistral import Mistral
from torchtrain.families.qwen2 import Qwen2
from torchtrain.families.qwen3 import Qwen3
from torchtrain.families.smollm3 import SmolLM3
from trainspec.families import FAMILIES as NEUTRAL

FAMILIES: dict[str, Anatomy] = {
    "llama": Llama(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "mistral": Mistral(),
    "smollm3": SmolLM3(),
    "glm": Glm(),
    "chatglm2": Glm(),
}


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a model that a family's `make` gave."""
    names = {family.model_type: name for name, family in NEUTRAL.items()}
    return FAMILIES[names[model.config.model_type]]  # a ChatGLM2 is one of Hugging Face's GLMs
