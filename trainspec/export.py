"""From a run's checkpoint to Hugging Face and PEFT files. Numpy only: both backends write the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec import checkpoint
from trainspec.adapters import write_adapter
from trainspec.errors import RecipeError
from trainspec.hf import model_files, read_rows, resolve_model, write_model
from trainspec.init import starting_weights
from trainspec.methods import PEFT_PREFIX, Full, LoRA, target_modules
from trainspec.model import ModelSpec, config_of
from trainspec.params import param_table
from trainspec.recipe import Recipe

SHARD_BYTES = 4 * 2**30
# Why a method is no change of the model's own weights.
NOT_MERGED = {
    "full": "has nothing to merge",
    "adapter": "cannot be merged: between its two matrices is a non-linearity",
    "prompt": "cannot be merged: its rows are in the input, not in a weight",
    "ptuning": "cannot be merged: its rows are in the input, not in a weight",
    "prefix": "cannot be merged: no weight makes its keys and values",
}


def export(recipe: Recipe, *, out: Path, merge: bool, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the newest checkpoint under OUT for others to load, read it back, and return its directory.

    Full gives `OUT/model` (Hugging Face), every other method `OUT/adapter`, LoRA with `merge` `OUT/merged`.
    Raises RecipeError where nothing was trained yet, or the method cannot be merged.
    """
    path = checkpoint.latest(out)
    if path is None:
        raise RecipeError(
            f"{out}: no checkpoint to export; train first, or give the run's directory with --out"
        )
    model, source = resolve_model(recipe.model)
    found = checkpoint.load(path, recipe=recipe, model=model).weights
    trained = {name: weight[...] for name, weight in found.items()}
    method = recipe.method
    if merge and not isinstance(method, LoRA):
        raise RecipeError(f"method.kind={method.kind} {NOT_MERGED[method.kind]}; leave --merge out")
    if not merge and not isinstance(method, Full):
        base = str(source.resolve()) if source else recipe.model.from_
        target = out / "adapter"
        write_adapter(target, trained, model=model, method=method, base=base)
        return target
    if isinstance(method, LoRA):
        target, weights = out / "merged", _merged(recipe, model, method, trained)
    else:
        target, weights = out / "model", ((p.name, trained[p.name]) for p in param_table(model))
    write_model(
        target,
        weights,
        companions_from=source,
        config=_config(model, source, trained),
        shard_bytes=shard_bytes,
    )
    for _, weight in read_rows(model_files(target), param_table(model), dtype=np.float32, where=target):
        weight[...]  # it reads back
    return target


def _merged(
    recipe: Recipe, model: ModelSpec, method: LoRA, trained: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """W + (alpha / rank) B A for every adapted module, summed in float64, one tensor at a time."""
    adapted = set(target_modules(model, method))
    base = recipe.model_copy(update={"method": Full()})
    for param, start in starting_weights(base, model):
        weight = start[...]
        if param.module in adapted and param.name.endswith(".weight"):
            a, b = (trained[f"{PEFT_PREFIX}{param.module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            weight = (weight.astype(np.float64) + method.scale * (b @ a)).astype(weight.dtype)
        yield param.name, weight


def _config(model: ModelSpec, source: Path | None, trained: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The model's own config.json, or one made from the spec for a preset; the stored type is named."""
    dtype = str(next(iter(trained.values())).dtype)
    if source is not None:
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        return config | {"dtype": dtype}
    return config_of(model) | {"dtype": dtype}
