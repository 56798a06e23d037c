"""The recipes that are shipped, and how a test reads them without a network."""

from __future__ import annotations

import re
from pathlib import Path

from small import ROOT

from trainspec.recipe import Recipe, load_recipe

FOLDER = ROOT / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))
# The preset with the sizes of each model that a recipe fetches.
PRESET_OF = {
    "hub:meta-llama/Llama-3.1-8B": "llama3.1-8b",
    "hub:meta-llama/Llama-2-70b-hf": "llama2-70b",
    "hub:Qwen/Qwen3-8B": "qwen3-8b",
    "hub:Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "hub:THUDM/chatglm2-6b": "chatglm2-6b",
    "hub:zai-org/chatglm2-6b": "chatglm2-6b",
}
# The demo's tokenizer has a chat template. Its ids are few, whatever the model's vocabulary.
TOKENIZER = ROOT / "build/demo-model"
COMMAND = re.compile(r"\b(jax|torch)train train configs/(\S+)")


def name_of(path: Path) -> str:
    """A recipe's name: its path below `configs`, without the ending."""
    return str(path.relative_to(FOLDER).with_suffix(""))


def offline(path: Path) -> list[str]:
    """Settings under which a recipe needs no network: the preset in place of the model that it fetches."""
    source = load_recipe(path).model.from_
    if not source.startswith("hub:"):
        return []
    return [f"model.from=preset:{PRESET_OF[source]}", "model.weights=random", f"data.tokenizer={TOKENIZER}"]


def load_offline(path: Path, *settings: str) -> Recipe:
    """The recipe under these settings."""
    return load_recipe(path, [*offline(path), *settings])


def backends_of(path: Path) -> list[str]:
    """The backends whose commands the recipe's comment names; all of them for the demo's recipes, which name none."""
    named = COMMAND.findall(path.read_text(encoding="utf-8"))
    assert all(file == str(path.relative_to(FOLDER)) for _, file in named), (
        f"{path}: a command of another recipe"
    )
    return sorted({backend for backend, _ in named}) or ["jax", "torch"]
