"""A run on this backend: set up the process, run the loop, clean up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxtrain import step
from jaxtrain.attention import choose_kernel, site_of
from jaxtrain.cluster import describe_devices, finish, processes, set_up
from jaxtrain.compilation import told_to
from jaxtrain.mesh import make_mesh
from trainspec.evaluation import loop as evaluation
from trainspec.evaluation.request import EvaluationRequest
from trainspec.failures import explained
from trainspec.generation import loop as generation
from trainspec.generation.request import GenerationRequest
from trainspec.runs.run import Run
from trainspec.training import loop
from trainspec.training.request import TrainRequest


def train(run: Run, request: TrainRequest) -> None:
    """Train to the recipe's last step; writes metrics and checkpoints, and on request a trace.

    Raises UserError for mistakes in the recipe or its files, NonFiniteLossError if the loss is not finite.
    """
    plan = run.recipe.plan
    with _ready(run, out=request.out):
        attention = choose_kernel(plan, site_of(run, make_mesh(plan))).name
        devices = replace(describe_devices(plan), attention=attention)
        request.clock.lap("devices and processes")
        with told_to(request.clock):
            loop.train(step, run, request, processes=processes(), devices=devices)


def evaluate(run: Run, request: EvaluationRequest) -> None:
    """Measure the newest checkpoint in the request's directory, and the starting weights, on the held-out records."""
    with _ready(run):
        devices = describe_devices(run.recipe.plan)
        evaluation.evaluate(step, run, request, processes=processes(), devices=devices)


def generate(run: Run, request: GenerationRequest) -> None:
    """Generate what the request asks for with the newest checkpoint in its directory, or with the starting weights."""
    with _ready(run):
        generation.generate(step, run, request, processes())


@contextmanager
def _ready(run: Run, *, out: Path | None = None) -> Iterator[None]:
    """Inside, the process is set up for a run, and cleaned up after it. Errors say what helps, and what is saved in `out`."""
    with explained(run, partial(describe_devices, run.recipe.plan), out=out):
        set_up(run)
        try:
            yield
        finally:
            finish()
