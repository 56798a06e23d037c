"""The torch module of every family of `trainspec.families`, by its name there."""

from __future__ import annotations

from typing import Any

from torchtrain.families.anatomy import Anatomy
from torchtrain.families.llama import Llama
from torchtrain.families.qwen3 import Qwen3
from trainspec.families import FAMILIES as NEUTRAL

FAMILIES: dict[str, Anatomy] = {"llama": Llama(), "qwen3": Qwen3()}


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a model that a family's `make` gave."""
    names = {family.model_type: name for name, family in NEUTRAL.items()}
    return FAMILIES[names[model.config.model_type]]
