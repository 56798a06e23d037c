"""A run on this backend: set the process up, train or evaluate, let it go."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torchtrain import step
from torchtrain.attention import choose_kernel
from torchtrain.cluster import describe_devices, finish, is_leader, start
from torchtrain.mesh import compute_device
from trainspec.failures import explained
from trainspec.recipe import Recipe
from trainspec.runs import loop
from trainspec.runs.request import TrainRequest


def train(recipe: Recipe, request: TrainRequest) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints, and a trace where `request` asks for one.

    Raises UserError for a mistake in the recipe or its files, NonFiniteLossError where the loss is not finite.
    """
    with explained(recipe, partial(describe_devices, recipe.plan), out=request.out):
        run = start(recipe)
        try:
            kernel = choose_kernel(
                recipe.plan.attention, policy=recipe.precision.policy, device=compute_device()
            )
            devices = replace(describe_devices(recipe.plan), attention=kernel)
            loop.train(step, run, request, is_leader=is_leader(), devices=devices)
        finally:
            finish()


def evaluate(recipe: Recipe, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and whose: that of the newest checkpoint in `out`, or of the starting weights."""
    with explained(recipe, partial(describe_devices, recipe.plan)):
        run = start(recipe)
        try:
            return loop.evaluate(step, run, out=out)
        finally:
            finish()
