"""The commands of torchtrain. A recipe is checked before torch is loaded, which takes longer than all the checks."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torchtrain.launch import launch
from torchtrain.processes import count_processes, has_launcher, is_leader
from trainspec.backends import BACKENDS
from trainspec.checkpoints.export import export
from trainspec.evaluation.request import evaluation_request
from trainspec.failures import explained
from trainspec.generation.request import generation_request
from trainspec.plans.accelerators import Devices
from trainspec.recipe import load_recipe
from trainspec.runs.run import Run
from trainspec.runs.stops import StopRequest
from trainspec.training.prepare import prepare, prepare_evaluation, prepare_generation
from trainspec.training.request import out_directory, train_request

BACKEND = BACKENDS["torch"]


def run(args: Namespace, words: Sequence[str]) -> None:
    """Run one command, given on the command line as `words`."""
    count_processes(os.environ)  # raises for an environment that is no launcher's
    if args.command == "convert":
        if is_leader():
            from torchtrain.convert import convert

            print(f"wrote {convert(args.directory, args.out)}")
        return
    recipe = load_recipe(args.recipe, args.overrides)
    out = out_directory(args, BACKEND.program)
    match args.command:
        case "train":
            request = train_request(args, out)
            run = prepare(recipe, BACKEND, request)
            if _needs_launch(run):
                _launch(run, words, logs=out / "logs", out=out, stop=request.stop)
                return
            request.clock.lap("recipe read and checked")
            train = _torch().train
            request.clock.lap("torch loaded")
            train(run, request)
        case "eval":
            request = evaluation_request(args, out)
            run = prepare_evaluation(recipe, BACKEND, out=request.trained_in)
            if _needs_launch(run):
                _launch(run, words, logs=out / "logs")
                return
            _torch().evaluate(run, request)
        case "generate":
            request = generation_request(args, out)
            run = prepare_generation(recipe, BACKEND, out=request.trained_in)
            if _needs_launch(run):
                _launch(run, words, logs=out / "logs")
                return
            _torch().generate(run, request)
        case "export":
            if is_leader():
                print(f"wrote {export(recipe, out=out, merge=args.merge, dtype=args.dtype)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")


def _torch() -> ModuleType:
    """`torchtrain.train`, loaded with torch at the first call."""
    from torchtrain import train

    return train


def _needs_launch(run: Run) -> bool:
    return run.recipe.plan.devices > 1 and not has_launcher(os.environ)


def _launch(
    run: Run, words: Sequence[str], *, logs: Path, out: Path | None = None, stop: StopRequest | None = None
) -> None:
    """Run the same command in a process for each device. This one has no devices, and what it says of memory is the machine's."""
    plan = run.recipe.plan
    here = Devices(BACKEND.name, "cpu", plan.devices, plan.devices, plan.devices, ())
    with explained(run, lambda: here, out=out):
        launch(BACKEND.program, words, processes=plan.devices, logs=logs, stop=stop)
