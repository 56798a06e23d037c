"""A run on this backend: set up the process, run the loop, clean up."""

from __future__ import annotations

from dataclasses import replace

from jaxtrain import cluster, step
from jaxtrain.attention import choose_kernel, site_of
from jaxtrain.compilation import told_to
from jaxtrain.mesh import make_mesh
from trainspec.evaluation import loop as evaluation
from trainspec.evaluation.request import EvaluationRequest
from trainspec.generation import loop as generation
from trainspec.generation.request import GenerationRequest
from trainspec.ready import ready
from trainspec.runs.run import Run
from trainspec.training import loop
from trainspec.training.request import TrainRequest


def train(run: Run, request: TrainRequest) -> None:
    """Train to the recipe's last step; writes metrics and checkpoints, and on request a trace.

    Raises UserError for mistakes in the recipe or its files, NonFiniteLossError if the loss is not finite.
    """
    plan = run.recipe.plan
    with ready(cluster, run, out=request.out):
        attention = choose_kernel(plan, site_of(run, make_mesh(plan))).name
        devices = replace(cluster.describe_devices(plan), attention=attention)
        request.clock.lap("devices and processes")
        with told_to(request.clock):
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
