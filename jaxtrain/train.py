"""A run on this backend: set the process up, loop, let it go."""

from __future__ import annotations

from pathlib import Path

from jaxtrain import step
from jaxtrain.parallel import finish, is_leader, start
from trainspec import loop
from trainspec.recipe import Recipe
from trainspec.trace import TraceRequest


def train(recipe: Recipe, *, out: Path, trace: TraceRequest | None = None, resume: bool = False) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints in `out`, every gradient in `trace`'s directory.

    Raises UserError for what the recipe or its files have wrong, NonFiniteLossError where the loss is no number.
    """
    start(recipe)
    try:
        loop.train(step, recipe, name="jaxtrain", out=out, trace=trace, resume=resume, is_leader=is_leader())
    finally:
        finish()


def evaluate(recipe: Recipe, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and whose: the newest checkpoint's in `out`, or else the starting weights'."""
    start(recipe)
    try:
        return loop.evaluate(step, recipe, out=out)
    finally:
        finish()
