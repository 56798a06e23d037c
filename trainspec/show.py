"""trainspec show: the resolved recipe, the model, what is trained, and what a plan holds on each device."""

from __future__ import annotations

from dataclasses import asdict
from typing import get_args

from trainspec.cost import cost_of
from trainspec.errors import PlanError
from trainspec.hf import resolve_model
from trainspec.loop import check_plan
from trainspec.methods import trainable_table
from trainspec.model import ModelSpec
from trainspec.plan import Backend
from trainspec.recipe import Recipe
from trainspec.report import describe


def show(recipe: Recipe) -> None:
    """Print what the recipe means."""
    model, _ = resolve_model(recipe.model)
    rows = trainable_table(model, recipe.method)
    print(recipe.to_yaml(), end="")
    print(f"# {describe(model, recipe.method, recipe.precision.policy)}")
    for param in rows:
        print(f"#   {param.name} {list(param.shape)}")
    for backend in get_args(Backend):
        try:
            check_plan(recipe, backend)
            print(f"# {backend}: each of {recipe.plan.devices} devices holds {_held(recipe, model, backend)}")
        except PlanError as error:
            print(f"# {backend}: {error}")


def _held(recipe: Recipe, model: ModelSpec, backend: Backend) -> str:
    """The training state on one device, in words."""
    held = cost_of(recipe, model, backend).held()
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in asdict(held).items())
    return f"{held.total / 2**20:,.1f} MiB of training state ({parts})"
