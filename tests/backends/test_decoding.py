"""A cache of keys and values gives the logits of whole rows: rows of different lengths, some of which end before others."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from backend import BACKEND, PROGRAM, start_state, train_step
from test_model import FP64, FULL, LORA

from trainspec.data import open_dataset
from trainspec.generation.decoding import WholeRows
from trainspec.generation.rows import batch_of
from trainspec.runs.run import resolve

METHODS = {
    "full": FULL,
    "lora": LORA,
    "dora": {"kind": "dora", "rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj", "lm_head"]},
    "adapter": {"kind": "adapter", "bottleneck": 4},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "projected": {"kind": "prefix", "virtual_tokens": 3, "projection": True, "hidden": 8},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 3, "hidden": 8},
}
LAYER_WITH_NORMS = {"jaxtrain": "DoRALinear", "torchtrain": "Magnitude"}
FROM_ZERO = {"kind": "prefix", "virtual_tokens": 3, "positions": "from_zero"}
FEW_METHODS = ("lora", "prefix", "prompt")
FAMILIES = ("mistral", "smollm3", "glm")
LONG = ("tied", "qwen3", "yarn-rope", "qwen2", "chatglm2", "linear-rope", "llama3-rope", "bias")
# A window that virtual tokens leave, and positions that begin at 0 after a prefix.
WITH_VIRTUAL_TOKENS = [
    ("mistral", METHODS["prefix"]),
    ("mistral", METHODS["prompt"]),
    ("mistral", FROM_ZERO),
    ("chatglm2", FROM_ZERO),
    ("plain", METHODS["ptuning"] | {"encoder": "lstm"}),
]
ROWS = [[1, 7, 9, 30, 4], [1, 5], [1, 300, 12, *range(40, 52)]]  # the last one leaves a window of 16
# Column by column: the second row ends after two tokens.
ADDED = [[11, 12, 13, 14], [21, 22, 23, 24], [31, -1, 33, 34], [41, -1, 43, 44]]
LIMIT = 64
ROUNDING = 1e-12


def moved(recipe):
    """A state whose method does something: after a large update, as an adapter starts without an effect."""
    state = start_state(recipe)
    batch = open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    state, _ = train_step(state, batch, lr=0.05)
    return state


def difference(recipe, state, *, limit: int = LIMIT) -> float:
    """The largest difference between logits of a cache and of whole rows, of rows that have not ended."""
    decoding = BACKEND.decoding(state, length=limit)
    assert decoding is not None
    whole = WholeRows(BACKEND, state, limit=limit)
    batch, last = batch_of(ROWS, limit=limit, count=4)
    found = [np.abs(decoding.begin(batch, last) - whole.begin(batch, last)).max()]
    for ids in np.array(ADDED, np.int32):
        going = ids >= 0
        found.append(np.abs(decoding.extend(ids)[going] - whole.extend(ids)[going]).max())
    return float(np.max(found))  # unlike max, NaN where one is


@pytest.mark.parametrize(
    "name", [name if name in FEW_METHODS else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_a_cache_has_every_method(make_recipe, name: str):
    recipe = make_recipe(method=METHODS[name], precision=FP64)
    assert difference(recipe, moved(recipe)) < ROUNDING


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)]
)
def test_a_cache_has_every_family(make_recipe, family: str):
    recipe = make_recipe(family, method=LORA, precision=FP64)
    assert difference(recipe, moved(recipe)) < ROUNDING


@pytest.mark.full
@pytest.mark.parametrize(("family", "method"), WITH_VIRTUAL_TOKENS)
def test_virtual_tokens_are_seen_as_in_whole_rows(make_recipe, family: str, method: dict):
    recipe = make_recipe(family, method=method, precision=FP64)
    assert difference(recipe, moved(recipe)) < ROUNDING


def test_a_cache_has_any_length_and_room_for_its_last_token(make_recipe):
    recipe = make_recipe("mistral", method=FULL, precision=FP64)
    assert difference(recipe, start_state(recipe), limit=len(ROWS[2]) + len(ADDED)) < ROUNDING


def test_norms_of_dora_are_computed_once(make_recipe, monkeypatch):
    layer = getattr(importlib.import_module(f"{PROGRAM}.methods.dora"), LAYER_WITH_NORMS[PROGRAM])
    calls, norms = [0], layer._norms

    def counted(*args):
        calls[0] += 1
        return norms(*args)

    state = moved(make_recipe(method=METHODS["dora"], precision=FP64))
    monkeypatch.setattr(layer, "_norms", counted)
    batch, last = batch_of(ROWS, limit=LIMIT, count=4)
    decoding = BACKEND.decoding(state, length=LIMIT)
    decoding.begin(batch, last)
    before = calls[0]
    for ids in np.array(ADDED, np.int32):
        decoding.extend(ids)
    assert calls[0] == before > 0
    # The control: rows without a cache compute them.
    WholeRows(BACKEND, state, limit=LIMIT).begin(batch, last)
    assert calls[0] > before


@pytest.mark.parametrize("change", ["another method", "another token"])
def test_a_cache_of_something_else_would_show(make_recipe, monkeypatch, change: str):
    """The negative controls: the adapter that is not there, and a token that was not added."""
    recipe = make_recipe(method=LORA, precision=FP64)
    state = moved(recipe)
    other = start_state(recipe) if change == "another method" else state
    decoding, whole = BACKEND.decoding(other, length=LIMIT), WholeRows(BACKEND, state, limit=LIMIT)
    batch, last = batch_of(ROWS, limit=LIMIT, count=4)
    shown = np.abs(decoding.begin(batch, last) - whole.begin(batch, last)).max()
    if change == "another token":
        assert shown < ROUNDING
        decoding.extend(np.array([11, 12, 13, 15], np.int32))
        whole.extend(np.array([11, 12, 13, 14], np.int32))
        ids = np.array([21, 22, 23, 24], np.int32)
        apart = np.abs(decoding.extend(ids) - whole.extend(ids)).max(axis=1)
        assert apart[:3].max() < ROUNDING
        shown = apart[3]
    assert shown > 1e-6
