"""The commands of jaxtrain. A recipe is checked before JAX is loaded, which takes longer than all the checks."""

from __future__ import annotations

import os
from argparse import Namespace
from types import ModuleType

from trainspec.backends import BACKENDS
from trainspec.checkpoints.export import export
from trainspec.evaluation.request import evaluation_request
from trainspec.generation.request import generation_request
from trainspec.plans.accelerators import accelerators
from trainspec.recipe import load_recipe
from trainspec.training.prepare import prepare, prepare_evaluation, prepare_generation
from trainspec.training.request import out_directory, train_request

BACKEND = BACKENDS["jax"]


def run(args: Namespace) -> None:
    """Run one command."""
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, BACKEND.program)
    match args.command:
        case "train":
            request = train_request(args, out)
            run = prepare(recipe, BACKEND, request)
            request.clock.lap("recipe read and checked")
            train = _jax().train
            request.clock.lap("JAX loaded")
            train(run, request)
        case "eval":
            request = evaluation_request(args, out)
            run = prepare_evaluation(recipe, BACKEND, out=request.trained_in)
            _jax().evaluate(run, request)
        case "generate":
            request = generation_request(args, out)
            run = prepare_generation(recipe, BACKEND, out=request.trained_in)
            _jax().generate(run, request)
        case "export":
            # Needs only files: the leader does it alone, and waits for no other process.
            if _is_leader():
                print(f"wrote {export(recipe, out=out, merge=args.merge, dtype=args.dtype)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")


def _jax() -> ModuleType:
    """`jaxtrain.train`, loaded with JAX at the first call."""
    if any(accelerator.kind == "GPU" for accelerator in accelerators()):
        # When a GPU's memory is full XLA warns with a page; the error that follows has the figures.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jaxtrain import train

    return train


def _is_leader() -> bool:
    """Whether this process has the console, by JAX's own word of the cluster."""
    _jax()
    from jaxtrain.cluster import is_leader

    return is_leader()
