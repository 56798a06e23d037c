"""A resolved run: what the recipe names is looked up once, and passed to everything that trains, saves or shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainspec.files.hf import resolve_model
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param, param_table
from trainspec.plans.capabilities import (
    Capabilities,
    check_fits,
    check_format,
    check_supported,
    check_trains,
)
from trainspec.plans.cost import Cost
from trainspec.plans.flops import Arithmetic, arithmetic
from trainspec.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A recipe and what it resolves to.

    - `spec`: the model's sizes and rules. `directory`: its files; None for a preset.
    - `model_table`: the entries of the model. `full_table`: these, then the method's.
    - `trained`: the entries that are trained. `frozen`: the others of `full_table`.
    """

    recipe: Recipe
    spec: ModelSpec
    directory: Path | None
    model_table: tuple[Param, ...]
    full_table: tuple[Param, ...]
    trained: tuple[Param, ...]
    frozen: tuple[Param, ...]

    @property
    def method_table(self) -> tuple[Param, ...]:
        """The entries that the method adds to the model."""
        return self.full_table[len(self.model_table) :]


def resolve(recipe: Recipe) -> Run:
    """The run of a recipe. Looks the model up, for `hub:` on the network. Raises ModelError."""
    return run_of(recipe, *resolve_model(recipe.model))


def run_of(recipe: Recipe, spec: ModelSpec, directory: Path | None) -> Run:
    """The run of a recipe whose model is known."""
    everything, trained = full_table(spec, recipe.method), trainable_table(spec, recipe.method)
    names = {p.name for p in trained}
    frozen = tuple(p for p in everything if p.name not in names)
    return Run(recipe, spec, directory, param_table(spec), everything, trained, frozen)


def resolve_on(recipe: Recipe, backend: Capabilities) -> Run:
    """The run of a recipe on a backend.

    Raises RecipeError where the backend has no such checkpoints, PlanError where it cannot run the plan, before the model is
    looked up, and where the plan does not divide model or batch. Called before a backend takes its devices, so that a user's mistake costs nothing.
    """
    check_format(recipe.checkpoint.format, backend)
    check_supported(recipe.plan, recipe.precision.policy, backend)
    run = resolve(recipe)
    check_plan(run, backend)
    return run


def check_plan(run: Run, backend: Capabilities) -> None:
    """Raises PlanError where the backend cannot run the plan, or where it does not divide model or batch."""
    plan, batch = run.recipe.plan, run.recipe.batch
    check_supported(plan, run.recipe.precision.policy, backend)
    check_fits(
        plan,
        run.spec,
        global_examples=batch.global_examples,
        accumulation=batch.accumulation,
        backend=backend,
    )
    check_trains(plan, run.spec, run.trained, backend)


def arithmetic_of(run: Run) -> Arithmetic:
    """The operations of the run's updates."""
    return arithmetic(run.spec, run.recipe.method, trained=run.trained, frozen=run.frozen)


def cost_of(run: Run, backend: Capabilities) -> Cost:
    """The cost of the run for one device of a backend."""
    recipe = run.recipe
    return backend.cost(
        model=run.spec,
        plan=recipe.plan,
        policy=recipe.precision.policy,
        reduce=recipe.precision.reduce,
        accumulation=recipe.batch.accumulation,
        trained=run.trained,
        frozen=run.frozen,
    )
