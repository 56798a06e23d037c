"""The backend under test, named by TWINTRAIN_BACKEND: the twins have the same functions, so they pass the same tests.

JAX and torch never share a process: `make test` runs this directory once for each.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from trainspec.backends import BACKENDS
from trainspec.evaluation.request import EvaluationRequest
from trainspec.files.hf import resolve_model
from trainspec.generation.request import Settings
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve_on
from trainspec.training.request import TrainRequest

NAME = os.environ.get("TWINTRAIN_BACKEND", "jax")
PROGRAM = f"{NAME}train"
_cli, _dropout, _cluster, _step, _train = (
    importlib.import_module(f"{PROGRAM}.{name}") for name in ("cli", "dropout", "cluster", "step", "train")
)
BACKEND = _step
main = _cli.main
finish, check_accelerators, describe_devices, default_devices = (
    getattr(_cluster, name)
    for name in ("finish", "check_accelerators", "describe_devices", "default_devices")
)
copied_bytes, eval_step, feed, logits, moments_of, next_logits, restore, shards_of, train_step, weights_of = (
    getattr(_step, name)
    for name in (
        "copied_bytes",
        "eval_step",
        "feed",
        "logits",
        "moments_of",
        "next_logits",
        "restore",
        "shards_of",
        "train_step",
        "weights_of",
    )
)


def train(recipe: Recipe, out: Path, **options: Any) -> None:
    _train.train(resolve_on(recipe, BACKENDS[NAME]), TrainRequest(out, **options))


def evaluate(recipe: Recipe, *, out: Path, max_tokens: int = 2, **options: Any) -> dict[str, Any]:
    """What eval.json has."""
    request = EvaluationRequest(out, Settings(max_tokens=max_tokens), **options)
    _train.evaluate(resolve_on(recipe, BACKENDS[NAME]), request)
    return json.loads((out / "eval.json").read_text(encoding="utf-8"))


def spec_of(recipe: Recipe):
    return resolve_model(recipe.model)[0]


def start_state(recipe: Recipe):
    """The run before its first update, in a process that is set up for it; conftest lets it go."""
    return _step.init_state(_cluster.start(recipe))


def keep_mask(key: tuple[int, int], *, step: int, rows: list[int], **shape) -> np.ndarray:
    """The backend's dropout mask of numbers, as numpy."""
    if NAME == "torch":
        import torch

        return _dropout.keep_mask(key, step=step, rows=torch.tensor(rows), **shape).numpy()
    import jax.numpy as jnp

    words = jnp.asarray(key, jnp.uint32)
    return np.asarray(
        _dropout.keep_mask(words, step=jnp.uint32(step), rows=jnp.asarray(rows, jnp.int32), **shape)
    )
