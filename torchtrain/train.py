"""A run on this backend: set the process up, train or evaluate, let it go."""

from __future__ import annotations

from dataclasses import replace

from torchtrain import cluster, step
from torchtrain.attention import choose_kernel
from torchtrain.mesh import compute_device
from trainspec.evaluation import loop as evaluation
from trainspec.evaluation.request import EvaluationRequest
from trainspec.generation import loop as generation
from trainspec.generation.request import GenerationRequest
from trainspec.ready import ready
from trainspec.runs.run import Run
from trainspec.training import loop
from trainspec.training.request import TrainRequest


def train(run: Run, request: TrainRequest) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints, and a trace where `request` asks for one.

    Raises UserError for a mistake in the recipe or its files, NonFiniteLossError where the loss is not finite.
    """
    plan = run.recipe.plan
    with ready(cluster, run, out=request.out):
        policy = run.recipe.precision.policy
        attention = choose_kernel(plan.attention, policy=policy, device=compute_device())
        devices = replace(cluster.describe_devices(plan), attention=attention)
        request.clock.lap("devices and processes")
        loop.train(step, run, request, processes=cluster.processes(), devices=devices)


def evaluate(run: Run, request: EvaluationRequest) -> None:
    """Measure the newest checkpoint in the request's directory, and the starting weights, on the held-out records."""
    with ready(cluster, run):
        devices = cluster.describe_devices(run.recipe.plan)
        evaluation.evaluate(step, run, request, processes=cluster.processes(), devices=devices)


def generate(run: Run, request: GenerationRequest) -> None:
    """Generate what the request asks for with the newest checkpoint in its directory, or with the starting weights."""
    with ready(cluster, run):
        generation.generate(step, run, request, cluster.processes())
