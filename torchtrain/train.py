"""A run on this backend: set the process up, train or evaluate, let it go."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torchtrain import step
from torchtrain.attention import choose_kernel
from torchtrain.cluster import describe_devices, finish, processes, set_up
from torchtrain.mesh import compute_device
from trainspec.failures import explained
from trainspec.generation import loop as generation
from trainspec.generation.request import GenerationRequest
from trainspec.runs import loop
from trainspec.runs.request import TrainRequest
from trainspec.runs.run import Run


def train(run: Run, request: TrainRequest) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints, and a trace where `request` asks for one.

    Raises UserError for a mistake in the recipe or its files, NonFiniteLossError where the loss is not finite.
    """
    plan = run.recipe.plan
    with explained(run, partial(describe_devices, plan), out=request.out):
        set_up(run)
        try:
            policy = run.recipe.precision.policy
            attention = choose_kernel(plan.attention, policy=policy, device=compute_device())
            devices = replace(describe_devices(plan), attention=attention)
            request.clock.lap("devices and processes")
            loop.train(step, run, request, processes=processes(), devices=devices)
        finally:
            finish()


def evaluate(run: Run, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and whose: that of the newest checkpoint in `out`, or of the starting weights."""
    with explained(run, partial(describe_devices, run.recipe.plan)):
        set_up(run)
        try:
            return loop.evaluate(step, run, out=out, processes=processes())
        finally:
            finish()


def generate(run: Run, request: GenerationRequest) -> None:
    """Generate what the request asks for with the newest checkpoint in its directory, or with the starting weights."""
    with explained(run, partial(describe_devices, run.recipe.plan)):
        set_up(run)
        try:
            generation.generate(step, run, request, processes())
        finally:
            finish()
