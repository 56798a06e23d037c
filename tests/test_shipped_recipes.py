"""Every recipe in `configs/` resolves, and fits the backends that it names; the table of them has the arithmetic's figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recipes import FOLDER, RECIPES, backends_of, load_offline, name_of

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.recipe import load_recipe
from trainspec.runs.run import cost_of, resolve_on

LARGE = [path for path in RECIPES if load_recipe(path).model.from_.startswith("hub:")]
TABLE = (FOLDER / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<file>[^`]+)` \|(?P<rest>.*)$", re.MULTILINE)
EACH = [pytest.param(path, backend, id=f"{name_of(path)}-{backend}") for path in RECIPES for backend in backends_of(path)]  # fmt: skip


def test_there_are_recipes_to_start_from():
    assert {load_recipe(path).model.from_ for path in LARGE} >= {
        "hub:meta-llama/Llama-3.1-8B",
        "hub:meta-llama/Llama-2-70b-hf",
        "hub:Qwen/Qwen3-8B",
        "hub:Qwen/Qwen2.5-0.5B-Instruct",
    }


@pytest.mark.parametrize(("path", "backend"), EACH)
def test_a_recipe_fits_the_backends_that_it_names(path: Path, backend: str):
    recipe = load_offline(path)
    run = resolve_on(recipe, BACKENDS[backend])  # raises where the support matrix or the plan refuses it
    assert run.trained
    assert recipe.data.sequence_tokens <= run.spec.max_positions
    assert recipe.plan.devices == 1 or f"{recipe.plan.devices}" in path.read_text(encoding="utf-8")
    assert Path(recipe.data.train).is_file()


@pytest.mark.parametrize(
    ("name", "setting", "backend", "message"),
    [
        ("llama3.1-8b-lora-v5e-16", "plan.tensor=3", "jax", "cannot split heads=32"),
        ("qwen3-8b-full-8xh100-v5p-16", "batch.global_examples=72", "torch", "cannot be split into 64 equal parts"),
        ("qwen3-8b-full-8xh100-v5p-16", "plan.fsdp=3", "jax", "cannot split embed=4096"),
        ("llama2-70b-lora-64xgpu", "plan.shards=params", "torch", "no ZeRO stage above 1"),
        ("llama2-70b-lora-64xgpu", "plan.pipe=81", "torch", "80 layers"),
        ("llama3.1-8b-lora-8xgpu", "precision={policy: fp64}", "torch", "DeepSpeed has no float64"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(name: str, setting: str, backend: str, message: str):
    """Control: the same recipes with a plan that does not divide the model or the batch, or that a backend does not run."""
    with pytest.raises(PlanError, match=message):
        resolve_on(load_offline(FOLDER / f"{name}.yaml", setting), BACKENDS[backend])


def test_the_table_names_every_recipe():
    listed = [match["file"] for match in ROW.finditer(TABLE)]
    assert sorted(listed) == [str(path.relative_to(FOLDER)) for path in RECIPES]


@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_the_table_has_the_state_of_a_device(path: Path):
    """In GiB, of the backend that needs more, as `trainspec show` says."""
    recipe = load_offline(path)
    uses = [
        cost_of(resolve_on(recipe, BACKENDS[b]), BACKENDS[b]).memory_use().total for b in backends_of(path)
    ]
    row = next(match["rest"] for match in ROW.finditer(TABLE) if match["file"] == path.name)
    cells = [cell.strip() for cell in row.split("|")]
    assert f"{max(uses) / 2**30:.1f} GiB" in cells
    assert f"{recipe.plan.devices}" in cells


@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_a_large_recipe_says_why(path: Path):
    """Every section whose setting depends on model or hardware has a comment on or above its line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for section in ("batch:", "plan:"):
        at = [i for i, line in enumerate(lines) if line.startswith(section)]
        assert all("#" in lines[i] or lines[i - 1].startswith("#") for i in at), section
    assert sum(line.count("#") for line in lines) >= 5
