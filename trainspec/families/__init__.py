"""The registry of model families, and which one a model or a `config.json` belongs to."""

from __future__ import annotations

from typing import Any

from trainspec.errors import ModelError, nearest
from trainspec.families.chatglm2 import ChatGLM2
from trainspec.families.config import format_setting
from trainspec.families.family import Family
from trainspec.families.glm import Glm
from trainspec.families.llama import Llama
from trainspec.families.mistral import Mistral
from trainspec.families.qwen2 import Qwen2
from trainspec.families.qwen3 import Qwen3
from trainspec.families.smollm3 import SmolLM3
from trainspec.model import ModelSpec

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Llama(), Qwen2(), Qwen3(), Mistral(), SmolLM3(), Glm(), ChatGLM2())
}

PRESETS: dict[str, ModelSpec] = {
    name: spec for family in FAMILIES.values() for name, spec in family.presets.items()
}


def family_of(model: ModelSpec) -> Family:
    """The family of a model."""
    return FAMILIES[model.family]


def family_of_config(config: dict[str, Any], *, where: str) -> Family:
    """The family of a parsed `config.json`. Raises ModelError for an unsupported one."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES.values():
        if family.matches(architectures, model_type):
            return family
    supported = ", ".join(
        f"{family.architecture} (model_type {family.model_type})" for family in FAMILIES.values()
    )
    raise ModelError(
        f"{where}: architectures {format_setting(architectures)} of model_type {format_setting(model_type)} are unsupported; "
        f"supported: {supported}"
    )


def preset(name: str) -> ModelSpec:
    """The preset of that name. Raises ModelError with the nearest known name."""
    if name not in PRESETS:
        raise ModelError(f"model.from: no preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
