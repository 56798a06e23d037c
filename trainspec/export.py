"""From a run's checkpoint to Hugging Face and PEFT files. Numpy only: both backends write the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trainspec import checkpoint
from trainspec.adapters import write_adapter
from trainspec.errors import RecipeError, WeightsError
from trainspec.hf import (
    model_files,
    read_model,
    read_rows,
    resolve_model,
    tokenizer_directory,
    write_model,
)
from trainspec.init import starting_weights
from trainspec.methods import PEFT_PREFIX, Full, LoRA, Method
from trainspec.model import ModelSpec, config_of
from trainspec.model_config import exported_config, read_config
from trainspec.params import Param, param_table
from trainspec.recipe import Recipe
from trainspec.weight import Array, WeightLike

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 4 * 2**30
# Why a method is no change of the model's own weights.
NOT_MERGED = {
    "full": "has nothing to merge",
    "adapter": "cannot be merged: between its two matrices is a non-linearity",
    "prompt": "cannot be merged: its rows are in the input, not in a weight",
    "ptuning": "cannot be merged: its rows are in the input, not in a weight",
    "prefix": "cannot be merged: no weight makes its keys and values",
}


def export(
    recipe: Recipe, *, out: Path, merge: bool, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the newest checkpoint under OUT for others to load, read it back, and return its directory.

    Full gives `OUT/model` (Hugging Face), every other method `OUT/adapter`, LoRA with `merge` `OUT/merged`; with the tokenizer
    that was trained with. A model is stored as `dtype`, or else as it was trained, a merged one as its base is.
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
    tokenizer = {"tokenizer_from": tokenizer_directory(recipe), "chat_template": _chat_template(recipe)}
    if not merge and not isinstance(method, Full):
        if dtype is not None:
            way_out = ", or fold the adapter into one with --merge" if isinstance(method, LoRA) else ""
            raise RecipeError(
                f"--dtype {dtype}: says how a whole model is stored, and this is an adapter; leave it out{way_out}"
            )
        base = str(source.resolve()) if source else recipe.model.from_
        write_adapter(out / "adapter", trained, model=model, method=method, base=base, **tokenizer)
        return out / "adapter"
    table = param_table(model)
    if isinstance(method, LoRA):
        target, rows = out / "merged", list(_base_rows(recipe, model, source))
    else:
        target, rows = out / "model", [(param, trained[param.name]) for param in table]
    stored = {param.name: DTYPES[dtype] if dtype else weight.dtype for param, weight in rows}
    config = _config(model, source, set(stored.values()))
    weights = (
        (p.name, _cast(_merged(p, weight[...], method, trained), p.name, stored[p.name]))
        for p, weight in rows
    )
    write_model(target, weights, companions_from=source, config=config, shard_bytes=shard_bytes, **tokenizer)
    for _, weight in read_rows(model_files(target), table, dtype=np.float32, where=target):
        weight[...]  # it reads back
    return target


def _chat_template(recipe: Recipe) -> Path | None:
    path = Path(recipe.data.chat_template) if recipe.data.chat_template else None
    if path and not path.is_file():
        raise RecipeError(
            f"data.chat_template: no file {path}; an export holds the template that was trained with"
        )
    return path


def _base_rows(recipe: Recipe, model: ModelSpec, source: Path | None) -> Iterable[tuple[Param, WeightLike]]:
    """The model that an adapter belongs to, as it is stored."""
    if source is not None and recipe.model.weights == "pretrained":
        return read_model(source, model, param_table(model), dtype=None)
    return starting_weights(recipe.model_copy(update={"method": Full()}), model)


def _merged(param: Param, weight: Array, method: Method, trained: Mapping[str, Array]) -> Array:
    """W + (alpha / rank) B A in float64 where `trained` has an adapter of this weight, else the weight itself."""
    a, b = (trained.get(f"{PEFT_PREFIX}{param.module}.lora_{x}.weight") for x in "AB")
    if not isinstance(method, LoRA) or a is None or b is None or not param.name.endswith(".weight"):
        return weight
    return weight.astype(np.float64) + method.scale * (b.astype(np.float64) @ a.astype(np.float64))


def _cast(array: Array, name: str, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(cast).any():
        raise WeightsError(f"{name} has values that are too large for float16; give another --dtype")
    return cast


def _config(model: ModelSpec, source: Path | None, stored: Set[np.dtype[Any]]) -> dict[str, Any]:
    """The model's own config.json, or one made from the spec for a preset; the stored type is named."""
    config = exported_config(read_config(source), model) if source else config_of(model)
    # Of several types it is the base's own word that says how it is loaded.
    told = config.get("dtype") or config.pop("torch_dtype", None)
    config.pop("torch_dtype", None)
    several = told or str(max(stored, key=lambda dtype: dtype.itemsize))
    return config | {"dtype": str(next(iter(stored))) if len(stored) == 1 else several}
