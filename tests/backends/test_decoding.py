"""A cache of keys and values gives the logits of whole rows: rows of different lengths, some of which end before others."""

from __future__ import annotations

import numpy as np
import pytest
from backend import BACKEND, start_state
from test_model import FP64, FULL, LORA

from trainspec.generation.decoding import WholeRows
from trainspec.generation.rows import batch_of

METHODS = {
    "full": FULL,
    "lora": LORA,
    "dora": {"kind": "dora", "rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
    "adapter": {"kind": "adapter", "bottleneck": 4},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "projected": {"kind": "prefix", "virtual_tokens": 3, "projection": True, "hidden": 8},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 3, "hidden": 8},
}
FAMILIES = ("plain", "tied", "qwen3", "qwen2", "mistral", "smollm3", "glm", "yarn-rope")
ROWS = [[1, 7, 9, 30, 4], [1, 5], [1, 300, 12, *range(40, 52)]]  # the last one leaves a window of 16
# Column by column: the second row ends after two tokens.
ADDED = [[11, 12, 13, 14], [21, 22, 23, 24], [31, -1, 33, 34], [41, -1, 43, 44]]
LIMIT = 64


def held_to_whole_rows(recipe) -> None:
    state = start_state(recipe)
    decoding = BACKEND.decoding(state, length=LIMIT)
    assert decoding is not None
    whole = WholeRows(BACKEND, state, limit=LIMIT)
    batch, last = batch_of(ROWS, limit=LIMIT, count=4)
    np.testing.assert_allclose(decoding.begin(batch, last), whole.begin(batch, last), rtol=0, atol=1e-12)
    before = None
    for ids in np.array(ADDED, np.int32):
        going = ids >= 0
        found, wanted = decoding.extend(ids)[going], whole.extend(ids)[going]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        assert before is None or not np.allclose(found[0], before)  # control
        before = found[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_cache_has_every_method(make_recipe, name: str):
    held_to_whole_rows(make_recipe(method=METHODS[name], precision=FP64))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_has_every_family(make_recipe, family: str):
    held_to_whole_rows(make_recipe(family, method=LORA, precision=FP64))
