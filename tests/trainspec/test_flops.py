"""The operations of an update, against counts by hand and against a mask that is written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALL

from trainspec.families import PRESETS
from trainspec.methods import EXAMPLES, Full, LoRA, MethodSpec, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.plans.flops import Arithmetic, arithmetic

# Of the smallest Llama whose count fits on a line: E 4, M 6, V 10, 2 heads of 2, 1 of keys and values, 1 layer.
TINY = replace(
    SMALL, vocab=10, embed=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6, tied_embeddings=False,
    attention_bias=False, mlp_bias=False, family="llama", window=None,
)  # fmt: skip
# q and o are 4 x 4, k and v 2 x 4, the three of the MLP 6 x 4.
LAYER = 2 * 16 + 2 * 8 + 3 * 24
HEAD = 10 * 4


def of(model: ModelSpec, method: MethodSpec) -> Arithmetic:
    trained = trainable_table(model, method)
    frozen = () if method.trains_model else param_table(model)
    return arithmetic(model, method, trained=trained, frozen=frozen)


def test_a_token_by_hand():
    assert of(TINY, Full()).per_token == 6 * (LAYER + HEAD)
    # LoRA of rank 2 in q (4 x 4) and v (2 x 4): A takes rank x in, B out x rank.
    adapter = (2 * 4 + 4 * 2) + (2 * 4 + 2 * 2)
    assert of(TINY, LoRA(rank=2)).per_token == 4 * (LAYER + HEAD) + 6 * adapter
    # The head is a target like others: its A is 2 x 4, its B 10 x 2.
    assert of(TINY, LoRA(rank=2, targets=("lm_head",))).per_token == 4 * (LAYER + HEAD) + 6 * (8 + 20)
    # The table of a tied model is multiplied once, as its head.
    assert of(replace(TINY, tied_embeddings=True), Full()).per_token == 6 * (LAYER + HEAD)
    # Biases, norms, DoRA's magnitudes and the encoder of virtual tokens multiply no matrix with the tokens.
    assert of(TINY, EXAMPLES["dora"]).per_token == of(TINY, LoRA(**low_rank("dora"))).per_token
    assert of(TINY, EXAMPLES["ptuning-mlp"]).per_token == 4 * (LAYER + HEAD)


def low_rank(name: str) -> dict:
    return {key: getattr(EXAMPLES[name], key) for key in ("rank", "targets")}


def test_a_batch_by_hand():
    count = Arithmetic(per_token=100.0, per_pair=1.0)
    # Segments of 3 and 2 tokens, and one of padding: 6 + 3 pairs. Then a whole row of 6: 21.
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    assert count.operations(segments) == 11 * 100 + 9 + 21
    # A window of 2 leaves each token itself and the one before: 5 + 3, and 11.
    assert replace(count, window=2).operations(segments) == 11 * 100 + 8 + 11
    # Every token sees a prefix of 4, in every window where it has no positions: 11 x 4 pairs more.
    prefix = replace(count, virtual=4)
    assert prefix.operations(segments) == 11 * 100 + 30 + 44
    assert replace(prefix, window=2).operations(segments) == 11 * 100 + 19 + 44
    # A prompt of 4 is computed too, once in a row, and sees itself: 8 tokens and 2 x 10 pairs more.
    prompt = replace(prefix, shift=4, leading=4)
    assert prompt.operations(segments) == 19 * 100 + 30 + 44 + 20


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from([None, 1, 2, 5]))
def test_pairs_are_those_of_the_mask(
    parts: list[int], virtual: int, has_positions: bool, leads: bool, window
):
    """A query sees the keys of its segment and the virtual ones, none after it, and none out of its window."""
    row = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), parts)
    has_positions |= leads  # embeddings in front have positions
    shift = virtual if has_positions else 0
    count = Arithmetic(0.0, 1.0, virtual, shift, virtual if leads else 0, window)
    queries = [(int(s), shift + i) for s, n in zip(range(1, 9), parts, strict=False) for i in range(n)]
    front = [(0, i) for i in range(virtual)]
    keys = front + queries
    near = lambda q, k: window is None or q - k < window  # noqa: E731
    pairs = sum(
        (s == 0 and not has_positions) or ((s in (0, mine)) and k <= q and near(q, k))
        for mine, q in queries + (front if leads else [])
        for s, k in keys
        if mine or not s
    )
    assert count.operations(row[None]) == pairs


def test_the_usual_rule_of_thumb_holds():
    """6 N tokens for whole training, where N counts the matrices of Llama-2-7B and a row of 4096 adds a tenth."""
    seven = PRESETS["llama2-7b"]
    row = np.ones((1, 4096), np.int32)
    whole = of(seven, Full()).operations(row)
    assert whole / (6 * 6.6e9 * 4096) == pytest.approx(1.08, abs=0.02)
    lora = of(seven, LoRA(targets="all-linear")).operations(row)
    assert 0.66 < lora / whole < 0.72
