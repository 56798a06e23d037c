"""From a run's checkpoint to Hugging Face and PEFT files. Numpy only: both backends write the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec import checkpoint
from trainspec.errors import RecipeError, WeightsError
from trainspec.hf import TensorFiles, model_files, read_rows, resolve_model, write_adapter, write_model
from trainspec.init import starting_weights
from trainspec.methods import PEFT_PREFIX, Full, LoRA, target_modules
from trainspec.model import ModelSpec, config_of
from trainspec.params import param_table
from trainspec.recipe import Recipe

SHARD_BYTES = 4 * 2**30


def export(recipe: Recipe, *, out: Path, merge: bool, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the newest checkpoint under OUT for others to load, read it back, and return its directory.

    LoRA gives `OUT/adapter` (PEFT), with `merge` `OUT/merged` (Hugging Face); Full gives `OUT/model`.
    Raises RecipeError where nothing was trained yet.
    """
    path = checkpoint.latest(out)
    if path is None:
        raise RecipeError(
            f"{out}: no checkpoint to export; train first, or give the run's directory with --out"
        )
    model, source = resolve_model(recipe.model)
    found = checkpoint.load(path, recipe=recipe, model=model).weights
    trained = {name: weight[...] for name, weight in found.items()}
    match recipe.method:
        case LoRA() as method if not merge:
            target = out / "adapter"
            base = str(source.resolve()) if source else recipe.model.from_
            write_adapter(target, trained, model=model, method=method, base=base)
            _verify(TensorFiles([target / "adapter_model.safetensors"]), trained, target)
            return target
        case LoRA() as method:
            target, weights = out / "merged", _merged(recipe, model, method, trained)
        case Full() if merge:
            raise RecipeError("method.kind=full has nothing to merge; leave --merge out")
        case Full():
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


def _verify(files: TensorFiles, expected: Mapping[str, NDArray[Any]], where: Path) -> None:
    for name, array in expected.items():
        if files.shapes.get(name) != array.shape or not np.array_equal(files.read(name), array):
            raise WeightsError(
                f"{where}: {name} does not read back as written; the disk may be full or failing"
            )
