"""Whether a run may resume from a checkpoint: what must be the same, what `--allow` lets change, and what is free.

Contents are compared (`trainspec.checkpoints.identity`), not paths. Free are where and how a run computes (plan, precision,
accumulation), its length, how often it reports and saves, and what it measures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainspec.checkpoints.allow import ALLOWABLE
from trainspec.checkpoints.identity import RANDOM, Identity, model_digest, weights_digest
from trainspec.complaint import format_value
from trainspec.errors import RecipeError
from trainspec.recipe import Recipe
from trainspec.runs.run import Run
from trainspec.schedule import learning_rate

# Settings that may not change.
FIXED = (
    "model.weights",
    "run.seed",
    "batch.global_examples",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
)


@dataclass(frozen=True)
class CheckpointOrigin:
    """How a checkpoint was made; `identity` is None where a version without digests wrote it."""

    path: Path
    step: int
    recipe: Recipe
    identity: Identity | None

    @property
    def recipe_file(self) -> Path:
        """The run's own recipe.yaml."""
        return self.path.parent.parent / "recipe.yaml"


@dataclass(frozen=True)
class _Change:
    """A setting, or the digest of a content, in the checkpoint and in the recipe, as text."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} was {self.was} and is {self.now}"


def check_loadable(origin: CheckpointOrigin, run: Run) -> None:
    """Raises RecipeError where a checkpoint's weights do not belong to the model and method of `run`."""
    recipe = run.recipe
    _refuse(origin, _method_changes(origin.recipe, recipe))
    was = origin.identity
    if was is None:
        return
    _refuse_model(origin, recipe, was.model, model_digest(run.spec), "the model's settings (config.json)")
    if not recipe.method.trains_model:  # a full checkpoint has every weight itself
        _refuse_model(origin, recipe, was.weights, weights_digest(run), "the model's weights")


def check_resumable(
    origin: CheckpointOrigin, recipe: Recipe, identity: Identity, *, steps: int, allow: Collection[str]
) -> list[str]:
    """What the user is told of resuming with `recipe`, whose schedule spans `steps` updates.

    Raises RecipeError where something has changed and is not among `allow`.
    """
    _refuse(origin, [*_method_changes(origin.recipe, recipe), *_changes(FIXED, origin.recipe, recipe)])
    changed = {group: _changes(keys, origin.recipe, recipe) for group, keys in ALLOWABLE.items()}
    lines = []
    if origin.identity is None:
        lines.append(
            f"{origin.path} is of an earlier version, which kept no digests: model, tokenizer and data were not compared"
        )
    else:
        _refuse_contents(origin, recipe, origin.identity, identity)
        if origin.identity.data != identity.data:
            was, now = (
                f"{r.data.train} (digest {i.data[:8]})"
                for r, i in ((origin.recipe, origin.identity), (recipe, identity))
            )
            changed["data"].insert(0, _Change("data.train", was, now))
    changed = {group: changes for group, changes in changed.items() if changes}
    forbidden = [group for group in changed if group not in allow]
    if forbidden:
        listed = ", ".join(str(change) for group in forbidden for change in changed[group])
        raise RecipeError(
            f"{origin.path}: {listed}; continue anyway with --resume --allow {','.join(changed)}, or use the recipe it was "
            f"made with, {origin.recipe_file}"
        )
    lines += [f"allowed: {change}" for changes in changed.values() for change in changes]
    return [*lines, *_schedule_lines(origin, recipe, steps), *_computation_lines(origin.recipe, recipe)]


def _computation_lines(was: Recipe, now: Recipe) -> list[str]:
    """A line each where precision or plan has changed: the run may resume, with other roundings."""
    lines = []
    for section in ("precision", "plan"):
        keys = (f"{section}.{key}" for key in type(getattr(now, section)).model_fields)
        if changes := _changes(keys, was, now):
            lines.append(", ".join(f"{c.key} was {c.was}, now {c.now}" for c in changes))
    return lines


def _schedule_lines(origin: CheckpointOrigin, recipe: Recipe, steps: int) -> list[str]:
    """A line where the length or the shape of the schedule has changed, so that the rate may jump."""
    planned = origin.recipe.run.steps
    if planned is None:  # checkpoints hold steps, not epochs
        return []
    old, new = (
        learning_rate(r.schedule, peak=r.optimizer.lr, step=origin.step, steps=span)
        for r, span in ((origin.recipe, planned), (recipe, steps))
    )
    if planned == steps and old == new:
        return []
    rate = f"the rate at step {origin.step + 1} is {new:.3g} {f'instead of {old:.3g}' if old != new else 'as before'}"
    return [rate if planned == steps else f"the schedule spanned {planned} updates, now {steps}: {rate}"]


def _refuse_contents(origin: CheckpointOrigin, recipe: Recipe, was: Identity, now: Identity) -> None:
    """Raises RecipeError where the model, the tokenizer or the method's start has changed."""
    theirs = origin.recipe
    _refuse_model(origin, recipe, was.model, now.model, "the model's settings (config.json)")
    _refuse_model(origin, recipe, was.weights, now.weights, "the model's weights")
    if was.tokenizer != now.tokenizer:
        old, new = (r.data.tokenizer or r.model.from_ for r in (theirs, recipe))
        raise RecipeError(
            f"{origin.path}: the tokenizer's files (chat template included) are not those it was made with: {old!r} was "
            f"{was.tokenizer[:8]}, {new!r} is {now.tokenizer[:8]}; name a directory that has them in data.tokenizer"
        )
    if was.method != now.method:
        old, new = (getattr(r.method, "adapter", None) for r in (theirs, recipe))
        raise RecipeError(
            f"{origin.path}: method.adapter was {_with_digest(old, was.method)} and is {_with_digest(new, now.method)}; "
            + (f"set method.adapter to that of {old}" if old else "set method.adapter=null")
        )


def _with_digest(name: str | None, digest: str) -> str:
    return f"{name!r} (digest {digest[:8]})" if name else "null"


def _refuse_model(origin: CheckpointOrigin, recipe: Recipe, was: str, now: str, what: str) -> None:
    if was == now:
        return
    old, new = (digest if digest == RANDOM else digest[:8] for digest in (was, now))
    raise RecipeError(
        f"{origin.path}: {what} are not those it was made with: {origin.recipe.model.from_!r} was {old}, "
        f"{recipe.model.from_!r} is {new}; set model.from to the model it was made with"
    )


def _refuse(origin: CheckpointOrigin, changes: list[_Change]) -> None:
    """Raises RecipeError for the first of `changes`."""
    for change in changes:
        raise RecipeError(
            f"{origin.path}: was made with {change.key}={change.was}, the recipe says {change.now}; use the recipe it "
            f"was made with, {origin.recipe_file}"
        )


def _method_changes(was: Recipe, now: Recipe) -> list[_Change]:
    """Changed settings of the method, except the path it starts from."""
    if was.method.kind != now.method.kind:
        return [_Change("method.kind", was.method.kind, now.method.kind)]
    keys = (f"method.{key}" for key in type(now.method).model_fields if key != "adapter")
    return _changes(keys, was, now)


def _changes(keys: Iterable[str], was: Recipe, now: Recipe) -> list[_Change]:
    pairs = ((key, _setting(was, key), _setting(now, key)) for key in keys)
    return [_Change(key, format_value(old), format_value(new)) for key, old, new in pairs if old != new]


def _setting(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
