"""Virtual tokens that start as a text: as its embeddings, or as its keys and values in every layer.

Computed in float64 numpy from the weights as stored, so that every backend and plan starts from the same numbers. With
the keys and values the model continues as after the text itself. Source: prefix tuning, arXiv 2101.00190, section 7.4 (a
prefix that starts as real words).
"""

# P prompt tokens, K kv heads, D head dim, L layers

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trainspec.errors import RecipeError
from trainspec.families import family_of
from trainspec.methods import leading_positions
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe
from trainspec.text.store import find_tokenizer
from trainspec.weight import Weight

Array = NDArray[Any]


def text_start(
    recipe: Recipe, model: ModelSpec, weights: Mapping[str, Weight], *, directory: Path | None
) -> Array:
    """The value of `prompt_encoder.embedding.weight` for the method's text, from the model's `weights`, in float64.

    Embeddings for a method that puts embeddings in front of the tokens, else the keys and values of every layer.
    """
    ids = _text_ids(recipe, model, directory)
    if leading_positions(recipe.method):
        return family_of(model).embedded(weights, ids)
    return keys_and_values(model, weights, ids).reshape(len(ids), -1)


def _text_ids(recipe: Recipe, model: ModelSpec, directory: Path | None) -> list[int]:
    """The tokens of the text, repeated or cut to the number of virtual tokens, as PEFT does it."""
    text, count = recipe.method.start_text, recipe.method.num_virtual_tokens
    assert text is not None  # the table has FromText only where there is one
    tokenizer = find_tokenizer(recipe.data, directory, recipe.model.from_)
    ids = tokenizer.encode(text, Path(recipe.data.cache))
    if not ids:
        raise RecipeError(f"method.text: {text!r} has no tokens; give a longer text")
    if max(ids) >= model.vocab:
        raise RecipeError(
            f"method.text: {tokenizer.directory} gives it token {max(ids)}, {model.name} has only {model.vocab}"
        )
    times = -(-count // len(ids))
    return (ids * times)[:count]


def keys_and_values(model: ModelSpec, weights: Mapping[str, Weight], ids: list[int]) -> Array:
    """The keys (rotated, at 2 layer) and values (at 2 layer + 1) of tokens `ids` at positions 0, 1, ...: [P, 2 L, K, D]."""
    return family_of(model).keys_and_values(model, weights, ids)
