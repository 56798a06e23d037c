"""A recipe's small twin: what is odd about the model, the plan and the method stays; only sizes shrink.

It is proven on a laptop before anything is rented. Weights are random, so that `config.json` and the tokenizer suffice.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainspec.files.hf import resolve_config, tokenizer_files
from trainspec.files.model_config import config_of
from trainspec.model import ModelSpec
from trainspec.plans.plan import MESH_AXES, Plan
from trainspec.recipe import Batch, Recipe, load_recipe, recipe_from
from trainspec.rope import rope_parameters
from trainspec.runs.run import Run, run_of

# The largest sizes of a twin. A head of 16 elements turns eight pairs, which reach from the fastest frequencies of a scaled
# rotation to those that are scaled.
AXIS, ACCUMULATION, MICROBATCHES, CHUNKS, FEW = 2, 2, 4, 2, 8
HEAD_DIM, SEQUENCE_TOKENS, LAYERS = 16, 128, 2
# A window that is shorter than an example.
WINDOW = SEQUENCE_TOKENS // 4
# Widths are multiples of this.
WIDTH = 8
MODEL_SIZES = ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "window", "init_std")
MODEL_DIRECTORY, RECIPE_FILE = "model", "recipe.yaml"


@dataclass(frozen=True)
class SmallTwin:
    """A recipe, its model, and what was kept and changed to make them, a line each; `original` is the run that it is a twin of."""

    original: Run
    recipe: Recipe
    model: ModelSpec
    kept: tuple[str, ...]
    changed: tuple[str, ...]

    def lines(self) -> list[str]:
        """What was kept and changed, for the user."""
        return [f"kept:    {'; '.join(self.kept)}", *(f"changed: {line}" for line in self.changed)]


def write_small_twin(path: Path, overrides: Sequence[str], directory: Path) -> SmallTwin:
    """The twin of the recipe at `path`, written to `directory`/recipe.yaml and `directory`/model, which are replaced.

    What `overrides` set is not shrunk. Reads no weights, and for `hub:` fetches none. Raises RecipeError and ModelError.
    """
    recipe = load_recipe(path, overrides)
    spec, source = resolve_config(recipe.model)
    model = directory / MODEL_DIRECTORY
    named = {override.partition("=")[0] for override in overrides}
    twin = small_twin(run_of(recipe, spec, source), directory=str(model), fixed=named)
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config_of(twin.model), indent=2) + "\n", encoding="utf-8")
    if source is not None:
        for file in tokenizer_files(source):
            (model / file).parent.mkdir(exist_ok=True)
            shutil.copy(source / file, model / file)
    (directory / RECIPE_FILE).write_text(twin.recipe.to_yaml(), encoding="utf-8")
    return twin


def small_twin(original: Run, *, directory: str, fixed: Collection[str] = ()) -> SmallTwin:
    """The twin of a run; its own model will lie in `directory`. Settings in `fixed` stay."""
    recipe, spec = original.recipe, original.spec
    sizes = {f"plan.{name}": size for name, size in small_plan(recipe.plan).items()}
    plan = recipe.plan.model_copy(
        update={key.removeprefix("plan."): size for key, size in sizes.items() if key not in fixed}
    )
    sizes |= {f"batch.{name}": size for name, size in small_batch(recipe.batch, recipe.plan, plan).items()}
    sizes |= {f"data.{name}": value for name, value in _small_data(recipe).items()}
    sizes |= {"checkpoint.keep_best": 0, "run.eval_generations": 0}  # nothing is measured
    if recipe.method.start is not None:
        sizes["method.adapter"] = None  # its weights have the large model's shapes
    tree = recipe.model_dump(mode="json", by_alias=True)
    model = small_model(spec, recipe.plan, plan)
    changed = [f"model.from {recipe.model.from_} -> {directory}, with random weights"]
    resized = [
        f"{name} {_shown(getattr(spec, name))} -> {_shown(getattr(model, name))}"
        for name in MODEL_SIZES
        if getattr(spec, name) != getattr(model, name)
    ]
    changed += [f"the model's {', '.join(resized)}"] if resized else []
    for key, value in sizes.items():
        section, _, name = key.partition(".")
        was = tree[section][name]
        if was != value and key not in fixed:
            tree[section][name] = value
            changed.append(f"{key} {_shown(was)} -> {_shown(value)}")
    tree["model"] = {"from": directory, "weights": "random"}
    return SmallTwin(original, recipe_from(tree), model, tuple(_kept(spec, recipe)), tuple(changed))


def small_model(spec: ModelSpec, plan: Plan, small: Plan) -> ModelSpec:
    """A model of the same family with the same flags; `small` is what `plan` becomes.

    The vocabulary stays, as the tokenizer's ids do. What stays of the sizes is how they relate: query heads per key/value
    head (one, some, or all, odd or even), and whether a layer's heads together are as wide as the residual stream, narrower
    or wider. Random weights are larger as the model is narrower, so that activations keep their size.
    """
    heads, kv_heads = _small_heads(spec)
    head_dim = min(spec.head_dim, HEAD_DIM)
    embed = _scaled(heads * head_dim, spec.embed / (spec.heads * spec.head_dim), most=spec.embed)
    chunks = small.pipe * small.chunks_per_stage
    uneven = bool(spec.layers % (plan.pipe * plan.chunks_per_stage))
    first_unrotated = min(spec.unrotated, default=0)
    layers = min(spec.layers, max(LAYERS, chunks + uneven, first_unrotated + 1))
    return replace(
        spec,
        name=f"small {spec.name}",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        embed=embed,
        mlp=_scaled(embed, spec.mlp / spec.embed, most=spec.mlp),
        window=None if spec.window is None else min(spec.window, WINDOW),
        unrotated=tuple(layer for layer in spec.unrotated if layer < layers),
        init_std=float(f"{spec.init_std * math.sqrt(spec.embed / embed):.3g}"),
    )


def small_plan(plan: Plan) -> dict[str, Any]:
    """The sizes of the twin's plan: every axis that is used stays in use."""
    chunks = min(plan.chunks, CHUNKS)
    microbatches = min(plan.microbatches, MICROBATCHES)
    if plan.chunks_per_stage > 1:
        microbatches = MICROBATCHES  # a schedule of several chunks takes them in groups of `pipe`
    axes = {axis: min(getattr(plan, axis), AXIS) for axis in MESH_AXES}
    return axes | {"microbatches": microbatches, "chunks": chunks}


def small_batch(batch: Batch, plan: Plan, small: Plan) -> dict[str, int]:
    """The sizes of the twin's batch: accumulation stays in use, and so do several examples in one pass."""
    accumulation = min(batch.accumulation, ACCUMULATION)
    parts = accumulation * small.microbatches * small.replicas
    in_a_pass = batch.global_examples / (batch.accumulation * plan.microbatches * plan.replicas)
    # A pass of several examples stays one where few passes make an update.
    examples = 2 * parts if in_a_pass > 1 and parts < FEW else parts
    return {"accumulation": accumulation, "global_examples": min(batch.global_examples, examples)}


def _small_data(recipe: Recipe) -> dict[str, Any]:
    if recipe.data.sequence_tokens <= SEQUENCE_TOKENS:
        return {"heldout": None}
    # Records that were not too long for an example must still be trained on.
    too_long = {"too_long": "cut"} if recipe.data.too_long == "skip" else {}
    return {"heldout": None, "sequence_tokens": SEQUENCE_TOKENS} | too_long


def _small_heads(spec: ModelSpec) -> tuple[int, int]:
    """Query and key/value heads."""
    group = spec.heads // spec.kv_heads
    if spec.kv_heads == 1:
        heads, kv_heads = (3 if group % 2 and group > 1 else min(group, 4)), 1
    elif group == 1:
        heads = kv_heads = min(spec.heads, 3 if spec.heads % 2 else 4)
    else:
        heads, kv_heads = 2 * (3 if group % 2 else 2), 2
    return (heads, kv_heads) if heads <= spec.heads else (spec.heads, spec.kv_heads)


def _scaled(width: int, ratio: float, *, most: int) -> int:
    """`width` times `ratio` as a multiple of WIDTH, equal to `width` only where `ratio` is 1."""
    scaled = max(WIDTH, WIDTH * round(width * ratio / WIDTH))
    if scaled == width and ratio != 1:
        scaled += WIDTH if ratio > 1 or width == WIDTH else -WIDTH
    return min(scaled, most)


def _kept(spec: ModelSpec, recipe: Recipe) -> Iterator[str]:
    group = spec.heads // spec.kv_heads
    yield f"family {spec.family}"
    yield "one key/value head per query head" if group == 1 else "query heads share key/value heads"
    heads_width = spec.heads * spec.head_dim
    if heads_width != spec.embed:
        yield f"heads together {'wider' if heads_width > spec.embed else 'narrower'} than the residual stream"
    yield "head tied to the embedding" if spec.tied_embeddings else "head of its own"
    biases = [
        name for name, is_there in (("attention", spec.attention_bias), ("mlp", spec.mlp_bias)) if is_there
    ]
    yield f"biases: {', '.join(biases) or 'none'}"
    rotation = rope_parameters(spec)
    numbers = [f"{name} {_shown(value)}" for name, value in rotation.items() if name != "rope_type"]
    yield f"rotation: {rotation['rope_type']} ({', '.join(numbers)})"
    if spec.unrotated:
        yield "layers without rotation"
    if spec.window is not None:
        yield "a window shorter than an example"
    yield f"norm eps {spec.norm_eps:g}"
    yield f"vocabulary of {spec.vocab}"
    yield f"method {recipe.method.kind}, data, optimizer, schedule, seed"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
