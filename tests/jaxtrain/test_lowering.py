"""Every recipe that JAX trains lowers to a program, with weights that are shapes only: no memory, no devices but fake ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from recipes import FOLDER, RECIPES, backends_of, load_offline, name_of, offline

from trainspec.plans.plan import COMPUTE_DTYPE
from trainspec.runs.run import resolve

MINE = [path for path in RECIPES if "jax" in backends_of(path)]
SAMPLE = FOLDER / "qwen3-8b-full-8xh100-v5p-16.yaml"
WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2}


def lowered(paths: list[Path], scratch: Path, **wrong: str) -> list[dict[str, Any]]:
    """What became of each recipe, and of `SAMPLE` with a wrong weight, in one process; those with most devices come first."""
    cases = [{"file": str(path), "settings": offline(path), "wrong": None} for path in paths]
    cases += [{"file": str(SAMPLE), "settings": offline(SAMPLE), "wrong": name} for name in wrong.values()]
    devices = max(load_offline(path).plan.devices for path in paths)
    return json.loads(launch("lower_recipes.py", cases, scratch, devices=devices)[0].read_text())


def check(path: Path, found: dict[str, Any]) -> None:
    recipe = load_offline(path)
    elements = sum(p.size for p in resolve(recipe).full_table)
    assert found["devices"] == recipe.plan.devices
    # A pipeline pads its stages to equal numbers of layers.
    whole = elements * WIDTH[COMPUTE_DTYPE[recipe.precision.policy]]
    assert whole <= found["weight_bytes"] <= 1.1 * whole
    assert found["live_bytes"] < 2**20
    assert found["same_state"]


def test_a_recipe_of_eight_billion_weights_lowers_and_a_wrong_shape_does_not(tmp_path: Path):
    right, wrong = lowered([SAMPLE], tmp_path, wrong="layers.mlp.down_proj.kernel")
    check(SAMPLE, right)
    assert right["weight_bytes"] > 16e9
    assert "shape" in wrong["error"]  # control


@pytest.mark.full
def test_every_recipe_lowers(tmp_path: Path):
    order = sorted(MINE, key=lambda path: -load_offline(path).plan.devices)
    for path, found in zip(order, lowered(order, tmp_path), strict=True):
        check(path, found)


def test_the_recipes_for_tpus_are_among_them():
    assert {"llama3.1-8b-lora-v5e-16", "llama2-70b-lora-v5p-64", name_of(SAMPLE)} <= {
        name_of(path) for path in MINE
    }
