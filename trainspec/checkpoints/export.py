"""A checkpoint as Hugging Face and PEFT files. Numpy only, a block of a tensor in memory, the same bytes from all backends.

`export` writes the newest checkpoint of a recipe's run beside it, `consolidate` any checkpoint by the recipe that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trainspec.checkpoints.checkpoint import load, read_origin
from trainspec.checkpoints.folders import latest
from trainspec.errors import RecipeError, WeightsError
from trainspec.families import family_of
from trainspec.files.adapters import write_adapter
from trainspec.files.hf import model_files, read_model, write_model
from trainspec.files.model_config import config_of, exported_config, read_config
from trainspec.init import base_weights
from trainspec.methods import MethodSpec
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.plans.plan import STORED_DTYPE
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, resolve
from trainspec.text.store import find_tokenizer
from trainspec.weight import Array, Index, Weight, WeightLike, computed

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 4 * 2**30


def export(
    recipe: Recipe,
    *,
    out: Path,
    merge: bool,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the newest checkpoint under OUT in formats of others, and return the directory written.

    Full gives `OUT/model` (Hugging Face), every other method `OUT/adapter`, one that is a change of weights with `merge`
    `OUT/merged`. Raises RecipeError where nothing was trained yet.
    """
    path = latest(out)
    if path is None:
        raise RecipeError(
            f"{out}: no checkpoint to export; train first, or give the run's directory with --out"
        )
    target = out / ("merged" if merge else "model" if recipe.method.trains_model else "adapter")
    consolidate(path, recipe, target, merge=merge, dtype=dtype, shard_bytes=shard_bytes, say=say)
    return target


def consolidate(
    path: Path,
    recipe: Recipe,
    target: Path,
    *,
    merge: bool,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> None:
    """Write the checkpoint at `path` as a Hugging Face model or a PEFT adapter, with the tokenizer that was trained with.

    A model is stored as `dtype`, or else as it was trained, a merged one as its base is. Raises RecipeError where the method
    cannot be merged, or the tokenizer would be another.
    """
    run = resolve(recipe)
    model, source, method = run.spec, run.directory, recipe.method
    trained = load(path, run).weights
    if merge and method.not_merged is not None:
        raise RecipeError(f"method.kind={method.kind} {method.not_merged}; leave --merge out")
    origin = read_origin(path)
    identity, template = origin.identity, origin.recipe.data.chat_template
    if template is not None and recipe.data.chat_template is None:
        raise RecipeError(
            f"{origin.recipe_file.parent}: was trained with data.chat_template={template}, the recipe has none, and the exported "
            f"model would be prompted in another format; export with the run's own recipe, {origin.recipe_file}"
        )
    is_model = merge or method.trains_model
    if dtype is not None and not is_model:
        way_out = ", or fold the adapter into one with --merge" if method.not_merged is None else ""
        raise RecipeError(
            f"--dtype {dtype}: says how a whole model is stored, and this is an adapter; leave it out{way_out}"
        )
    tokenizer = _tokenizer(recipe, model, source, identity.tokenizer if identity else None, say)
    if not is_model:
        base = str(source.resolve()) if source else recipe.model.from_
        write_adapter(target, trained, model=model, method=method, base=base, **tokenizer)
        return
    config, weights = _model(run, trained, DTYPES[dtype] if dtype else None)
    write_model(target, weights, companions_from=source, config=config, shard_bytes=shard_bytes, **tokenizer)
    read_model(target, model, run.model_table, dtype=None)  # raises where it is no such model


def _tokenizer(
    recipe: Recipe, model: ModelSpec, source: Path | None, was: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """The exported tokenizer's directory and chat template, as arguments of `write_model`; `was` is the run's digest.

    Raises RecipeError where transformers would load the files as another tokenizer next to this model.
    """
    tokenizer = find_tokenizer(recipe.data, source, recipe.model.from_)
    home, now = tokenizer.directory, tokenizer.digest
    kind = read_config(home).get("model_type") if (home / "config.json").is_file() else None
    family = family_of(model)
    if kind not in (None, family.model_type):
        raise RecipeError(
            f"data.tokenizer: {home} belongs to model_type {kind!r}, by which transformers chooses the tokenizer's class; "
            f"with a {family.title} it would choose another. Save the class with it: python -c "
            f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{home}').save_pretrained('NEW')\", "
            "and set data.tokenizer=NEW"
        )
    if was not in (None, now):
        say(
            f"{home}: the tokenizer's files have changed since the run (digest {was[:8]}, now {now[:8]}); the new ones are exported"
        )
    return {"tokenizer_from": home, "chat_template": tokenizer.template}


def _model(
    run: Run, trained: Mapping[str, WeightLike], dtype: np.dtype[Any] | None
) -> tuple[dict[str, Any], list[tuple[str, WeightLike]]]:
    """The `config.json` of a whole model, and its weights, made on demand as `dtype` or as each is stored."""
    method, table = run.recipe.method, run.model_table
    entries: Sequence[tuple[Param, WeightLike]] = (
        [(param, trained[param.name]) for param in table] if method.trains_model else list(_base_weights(run))
    )
    weights = [(p.name, _made(method, p, weight, trained, dtype or weight.dtype)) for p, weight in entries]
    config = _config(run.spec, run.directory, {weight.dtype for _, weight in weights})
    return config, [*weights, *_derived(run)]


def _made(
    method: MethodSpec,
    param: Param,
    weight: WeightLike,
    trained: Mapping[str, WeightLike],
    dtype: np.dtype[Any],
) -> Weight:
    """The model's weight with the trained ones merged in, a block of rows at a time, as `dtype`."""

    def rows(index: Index) -> Array:
        return _cast(method.merged(param, weight[index], trained, index[0]), param.name, dtype)

    return computed(param.shape, dtype, rows)


def _derived(run: Run) -> Iterator[tuple[str, WeightLike]]:
    """What the base's files have besides weights, as it is."""
    if run.directory is None or run.recipe.model.weights == "random":
        return
    files = model_files(run.directory)
    yield from (
        (name, files.weight(name, None)) for name in family_of(run.spec).derived if name in files.shapes
    )


def _base_weights(run: Run) -> Iterable[tuple[Param, WeightLike]]:
    """The weights of the base model, as they are stored."""
    if run.directory is not None and run.recipe.model.weights == "pretrained":
        return read_model(run.directory, run.spec, run.model_table, dtype=None)
    return base_weights(run, STORED_DTYPE[run.recipe.precision.policy])


def _cast(array: Array, name: str, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(cast).any():
        raise WeightsError(f"{name} has values that are too large for float16; give another --dtype")
    return cast


def _config(model: ModelSpec, source: Path | None, stored: Set[np.dtype[Any]]) -> dict[str, Any]:
    """The model's own config.json, or a preset's made from its spec, with the stored type under the name that it has there."""
    config = exported_config(read_config(source), model) if source else config_of(model)
    # Older programs, such as a model's own code, know the older name alone.
    name = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
    # With several types, the base's config says which one the model is loaded in.
    several = config.get(name) or str(max(stored, key=lambda dtype: dtype.itemsize))
    return config | {name: str(next(iter(stored))) if len(stored) == 1 else several}
