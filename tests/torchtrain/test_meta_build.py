"""Every recipe that torch trains builds its module on the meta device: the shapes of one process, and no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import FOLDER, RECIPES, backends_of, load_offline, name_of

from torchtrain.mesh import Peers
from torchtrain.methods import attach
from torchtrain.model import build_model
from torchtrain.weights import canonical_name
from trainspec.plans.plan import Plan, local_size
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

MINE = [path for path in RECIPES if "torch" in backends_of(path)]
# A module of half a billion weights, quickly built.
FAST = "qwen2.5-0.5b-lora-laptop"


def built(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """The elements of each weight on the last of the tensor peers, and of those that are trained."""
    run, plan = resolve(recipe), recipe.plan
    peers = Peers(None, plan.tensor - 1, plan.tensor)
    policy = recipe.precision.policy
    model = build_model(run.spec, policy=policy, remat="none", attention="auto", tensor=peers)
    attach(model, run.spec, recipe.method, seed=recipe.run.seed, tensor=peers)
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    assert all(p.is_meta for p in parameters.values())
    sizes = {name: p.numel() for name, p in parameters.items()}
    return sizes, {name: sizes[name] for name, p in parameters.items() if p.requires_grad}


def said(recipe: Recipe, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """The same by the table's arithmetic."""
    run = resolve(recipe)
    everything, trained = (
        {p.name: local_size(p, plan, over_fsdp=False) for p in table}
        for table in (run.full_table, run.trained)
    )
    return everything, trained


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=name_of(p), marks=() if name_of(p) == FAST else pytest.mark.full) for p in MINE]
)  # fmt: skip
def test_a_recipe_builds_with_the_shapes_of_the_table(path: Path):
    recipe = load_offline(path)
    assert built(recipe) == said(recipe, recipe.plan)


def test_another_plan_has_other_shapes():
    """Control: one tensor peer more."""
    recipe = load_offline(FOLDER / f"{FAST}.yaml")
    split = recipe.model_copy(update={"plan": Plan(tensor=2)})
    assert built(split) == said(split, split.plan)
    assert built(split) != said(split, Plan())
