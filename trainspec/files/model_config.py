"""A Hugging Face `config.json`, read as a ModelSpec and written from one. The family knows its fields.

Settings that transformers honours are honoured or refused by name; where two contradict, a note says which one counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainspec.errors import ModelError
from trainspec.families import family_of, family_of_config
from trainspec.model import ModelSpec


def read_model_spec(directory: Path) -> ModelSpec:
    """The ModelSpec of a Hugging Face model directory. Raises ModelError where it can't be trained here."""
    return model_spec_from_config(
        read_config(directory), name=directory.name, where=str(directory / "config.json")
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory. Raises ModelError where it is missing or not a JSON object."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(
            f"model.from: no directory {directory}; give a Hugging Face model directory, hub:ORG/NAME or preset:NAME "
            f"(`make model` makes the demo's)"
        )
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"model.from: {directory} is an adapter; set method.adapter to it, and model.from to the model it belongs to"
            )
        raise ModelError(f"{path}: missing; a Hugging Face model directory holds a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object; copy or download it again")
    return config


def model_spec_from_config(config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
    """The ModelSpec of a parsed `config.json`; `where` names the source in errors.

    Raises ModelError for another architecture, and for a field that is missing, malformed or unsupported.
    """
    return family_of_config(config, where=where).spec_of(config, name=name, where=where)


def config_notes(config: dict[str, Any], *, where: str) -> list[str]:
    """A line for every setting of a `config.json` that differs from what is trained, as in transformers."""
    return [f"{where}: {note}" for note in family_of_config(config, where=where).notes(config, where=where)]


def config_of(model: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a spec without its stored type, as `model_spec_from_config` reads it."""
    return family_of(model).config_of(model)


def exported_config(config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
    """`config` for the weights of `model`: unchanged except for nulls and for settings that contradict the spec."""
    family = family_of(model)
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    return family.export_config(config, model) | named
