"""Virtual tokens that start as a text: its embeddings, or the keys and values that it leaves in the model.

Computed in numpy from the weights as they are read, in float64: every backend and plan starts from the same numbers.
The second makes a prefix behind which the model goes on as behind the text itself. Source: prefix tuning, arXiv
2101.00190, section 7.4 (a prefix that starts as real words).
"""

# P prompt tokens, E embed, H query heads, K kv heads, G query heads per kv head, D head dim, L layers

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.errors import RecipeError
from trainspec.hf import resolve_model
from trainspec.methods import leading_rows
from trainspec.model import ModelSpec, inverse_frequencies
from trainspec.numpy_layers import sigmoid
from trainspec.recipe import Recipe
from trainspec.text.store import find_tokenizer
from trainspec.weight import Weight

Array = NDArray[Any]


def text_start(recipe: Recipe, model: ModelSpec, weights: Mapping[str, Weight]) -> Array:
    """`prompt_encoder.embedding.weight` as the method's text makes it with the model's `weights`, in float64.

    Embeddings for a method that puts them before those of the tokens, else the keys and values of every layer.
    """
    ids = _text_ids(recipe, model)
    if leading_rows(recipe.method):
        return _embedded(weights, ids)
    return keys_and_values(model, weights, ids).reshape(len(ids), -1)


def _text_ids(recipe: Recipe, model: ModelSpec) -> list[int]:
    """The tokens of the text, repeated or cut to the number of virtual tokens, as PEFT does it."""
    text, count = recipe.method.start_text, recipe.method.num_virtual_tokens
    assert text is not None  # the table says that it starts as one
    directory = resolve_model(recipe.model)[1]
    tokenizer = find_tokenizer(recipe.data, directory, recipe.model.from_)
    ids = tokenizer.encode(text, Path(recipe.data.cache))
    if not ids:
        raise RecipeError(f"method.text: {text!r} has no tokens; write some words")
    if max(ids) >= model.vocab:
        raise RecipeError(
            f"method.text: {tokenizer.directory} gives it token {max(ids)}, {model.name} has only {model.vocab}"
        )
    times = -(-count // len(ids))
    return (ids * times)[:count]


def _embedded(weights: Mapping[str, Weight], ids: list[int]) -> Array:
    table = weights["model.embed_tokens.weight"]
    rows = {i: table[(slice(i, i + 1), slice(None))] for i in set(ids)}
    return np.concatenate([rows[i] for i in ids]).astype(np.float64)


def keys_and_values(model: ModelSpec, weights: Mapping[str, Weight], ids: list[int]) -> Array:
    """What attention to the tokens `ids` at positions 0, 1, ... reads: [P, 2 L, K, D], keys (rotated) at 2 layer."""
    x_PE = _embedded(weights, ids)
    turns = np.arange(len(ids))[:, None] * inverse_frequencies(model, np.float64)
    angles_PD = np.concatenate([turns, turns], axis=-1)[:, None, :]
    found = np.empty((len(ids), 2 * model.layers, model.kv_heads, model.head_dim))
    for i in range(model.layers):
        layer = _Layer(model, weights, f"model.layers.{i}")
        normed = layer.norm("input_layernorm", x_PE)
        q, k, v = (
            layer.linear(f"self_attn.{name}_proj", normed).reshape(len(ids), -1, model.head_dim)
            for name in "qkv"
        )
        q, k = _rotate(q, angles_PD), _rotate(k, angles_PD)
        found[:, 2 * i], found[:, 2 * i + 1] = k, v
        if i + 1 == model.layers:
            return found
        x_PE = x_PE + layer.linear("self_attn.o_proj", _attend(q, k, v).reshape(len(ids), -1))
        x_PE = x_PE + layer.mlp(layer.norm("post_attention_layernorm", x_PE))
    return found


class _Layer:
    """One layer's functions; a weight is in memory while it is used."""

    def __init__(self, model: ModelSpec, weights: Mapping[str, Weight], base: str) -> None:
        self._eps, self._weights, self._base = model.norm_eps, weights, base

    def norm(self, module: str, x: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps) * self._read(f"{module}.weight")

    def linear(self, module: str, x: Array) -> Array:
        y = x @ self._read(f"{module}.weight").T
        has_bias = f"{self._base}.{module}.bias" in self._weights
        return y + self._read(f"{module}.bias") if has_bias else y

    def mlp(self, x: Array) -> Array:
        gate = self.linear("mlp.gate_proj", x)
        return self.linear("mlp.down_proj", gate * sigmoid(gate) * self.linear("mlp.up_proj", x))

    def _read(self, name: str) -> Array:
        return self._weights[f"{self._base}.{name}"][...].astype(np.float64)


def _rotate(x_PHD: Array, angles_P1D: Array) -> Array:
    first, second = np.split(x_PHD, 2, axis=-1)
    return x_PHD * np.cos(angles_P1D) + np.concatenate([-second, first], axis=-1) * np.sin(angles_P1D)


def _attend(q_PHD: Array, k_PKD: Array, v_PKD: Array) -> Array:
    P, H, D = q_PHD.shape
    grouped = q_PHD.reshape(P, k_PKD.shape[1], -1, D)
    scores = np.einsum("qkgd,skd->kgqs", grouped, k_PKD) / np.sqrt(D)
    scores = np.where(np.tril(np.ones((P, P), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("kgqs,skd->qkgd", shares, v_PKD).reshape(P, H, D)
