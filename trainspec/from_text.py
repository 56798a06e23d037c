"""Virtual tokens that start as a text: its embeddings, or the keys and values that it leaves in the model.

Computed in numpy from the weights as they are read, in float64: every backend and plan starts from the same numbers.
The second makes a prefix after which the model continues as after the text itself. Source: prefix tuning, arXiv
2101.00190, section 7.4 (a prefix that starts as real words).
"""

# P prompt tokens, K kv heads, D head dim, L layers

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trainspec.errors import RecipeError
from trainspec.families import family_of
from trainspec.hf import resolve_model
from trainspec.methods import PrefixTuning, PromptTuning
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe
from trainspec.text.store import find_tokenizer
from trainspec.weight import Weight

Array = NDArray[Any]


def text_start(
    recipe: Recipe, model: ModelSpec, method: PromptTuning | PrefixTuning, weights: Mapping[str, Weight]
) -> Array:
    """The weight `prompt_encoder.embedding.weight` that `method.text` makes with the model's `weights`, in float64."""
    ids = _text_ids(recipe, model, method)
    if isinstance(method, PromptTuning):
        return family_of(model).embedded(weights, ids)
    return keys_and_values(model, weights, ids).reshape(len(ids), -1)


def _text_ids(recipe: Recipe, model: ModelSpec, method: PromptTuning | PrefixTuning) -> list[int]:
    """The tokens of the text, repeated or cut to the number of virtual tokens, as PEFT does it."""
    assert method.text is not None  # the recipe is refused without it
    directory = resolve_model(recipe.model)[1]
    tokenizer = find_tokenizer(recipe.data, directory, recipe.model.from_)
    ids = tokenizer.encode(method.text, Path(recipe.data.cache))
    if not ids:
        raise RecipeError(f"method.text: {method.text!r} has no tokens; write some words")
    if max(ids) >= model.vocab:
        raise RecipeError(
            f"method.text: {tokenizer.directory} gives it token {max(ids)}, {model.name} has only {model.vocab}"
        )
    times = -(-method.virtual_tokens // len(ids))
    return (ids * times)[: method.virtual_tokens]


def keys_and_values(model: ModelSpec, weights: Mapping[str, Weight], ids: list[int]) -> Array:
    """What attention to the tokens `ids` at positions 0, 1, ... reads: [P, 2 L, K, D], keys (rotated) at 2 layer."""
    return family_of(model).keys_and_values(model, weights, ids)
