"""A run on this backend: set up the process, run the loop, clean up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxtrain import step
from jaxtrain.attention import choose, site_of
from jaxtrain.cluster import describe_devices, finish, is_leader, start
from jaxtrain.mesh import make_mesh
from trainspec.failures import explained
from trainspec.recipe import Recipe
from trainspec.runs import loop
from trainspec.runs.request import TrainRequest


def train(recipe: Recipe, request: TrainRequest) -> None:
    """Train to the recipe's last step; writes metrics and checkpoints, and on request a trace.

    Raises UserError for mistakes in the recipe or its files, NonFiniteLossError if the loss is not finite.
    """
    with explained(recipe, partial(describe_devices, recipe.plan), out=request.out):
        run = start(recipe)
        try:
            attention = choose(recipe.plan, site_of(run, make_mesh(recipe.plan))).name
            devices = replace(describe_devices(recipe.plan), attention=attention)
            loop.train(step, run, request, is_leader=is_leader(), devices=devices)
        finally:
            finish()


def evaluate(recipe: Recipe, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and of which weights: the newest checkpoint's in `out`, else the starting ones."""
    with explained(recipe, partial(describe_devices, recipe.plan)):
        run = start(recipe)
        try:
            return loop.evaluate(step, run, out=out)
        finally:
            finish()
