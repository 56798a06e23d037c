"""The loss in chunks is the plain loss: its sum, its count and every gradient, in float64, whatever the chunk."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from backend import PROGRAM, eval_step, logits, start_state, train_step
from test_invariance import laid_out, packed
from test_model import FP64

from trainspec.data import IGNORED

ROWS, TOKENS = 8, 48  # of `laid_out`
ROUNDING = 1e-13  # of a sum of a few hundred terms, and of a tensor's largest entry
# Neither divides the row, with or without the prompt's virtual tokens.
CHUNK, WHOLE = 7, 48
PIECES = [(list(range(5 + 3 * i, 14 + 5 * i)), 1 + i % 2) for i in range(9)]
BATCH = laid_out([*packed(PIECES), [PIECES[1]]], left=True)
CASES = {
    "full": ("plain", {"kind": "full"}),
    "tied": ("tied", {"kind": "full"}),
    "lora-head": (
        "plain",
        {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.3, "targets": ["lm_head", "k_proj"]},
    ),
    "dora-head": ("plain", {"kind": "dora", "rank": 3, "alpha": 5.0, "dropout": 0.3, "targets": ["lm_head"]}),
    "prompt": ("plain", {"kind": "prompt", "virtual_tokens": 3}),
}


def in_chunks(make_recipe, case, chunk, *, accumulation=2):
    """(loss sum, tokens) of an evaluation, and the metrics of an update, of the same weights and examples."""
    variant, method = CASES[case]
    recipe = make_recipe(
        variant,
        method=method,
        precision=FP64,
        batch={"global_examples": ROWS, "accumulation": accumulation},
        plan={"loss_chunk": chunk},
    )
    state = start_state(recipe)
    evaluated = eval_step(state, BATCH)
    return evaluated, train_step(state, BATCH, lr=0.0, keep="gradients")[1]


@pytest.mark.skipif(PROGRAM != "torchtrain", reason="JAX differentiates what it is asked to alone")
def test_an_evaluation_makes_no_gradients(make_recipe, monkeypatch):
    torch = importlib.import_module("torch")
    recipe = make_recipe(
        "tied",
        method={"kind": "full"},
        precision=FP64,
        batch={"global_examples": ROWS},
        plan={"loss_chunk": CHUNK},
    )
    state = start_state(recipe)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient of an evaluation"))
    assert eval_step(state, BATCH)[1] == BATCH.target_tokens
    with pytest.raises(pytest.fail.Exception):  # the control
        train_step(state, BATCH, lr=0.0)


def furthest(mine, theirs):
    assert mine.keys() == theirs.keys()
    # LoRA's B is zero at the start, and so is the gradient of its A.
    return np.max([np.abs(mine[n] - g).max() / max(np.abs(g).max(), 1e-30) for n, g in theirs.items()])


def assert_equal(found, plain, rounding):
    (loss_sum, tokens), metrics = found
    (plain_sum, plain_tokens), plain_metrics = plain
    assert tokens == metrics.tokens == plain_tokens == BATCH.target_tokens
    assert loss_sum == pytest.approx(plain_sum, rel=rounding)
    assert metrics.loss_sum == pytest.approx(plain_metrics.loss_sum, rel=rounding)
    assert furthest(metrics.gradients, plain_metrics.gradients) <= rounding


@pytest.mark.parametrize(
    "case", [c if c == "lora-head" else pytest.param(c, marks=pytest.mark.full) for c in CASES]
)
def test_chunks_give_the_plain_loss_and_its_gradients(make_recipe, case):
    plain = in_chunks(make_recipe, case, "auto")
    assert_equal(in_chunks(make_recipe, case, CHUNK), plain, ROUNDING)


@pytest.mark.full
@pytest.mark.parametrize("case", ["tied", "lora-head", "prompt"])
@pytest.mark.parametrize("chunk", [1, WHOLE - 1, WHOLE, WHOLE + 5])
def test_any_chunk_gives_the_plain_loss(make_recipe, case, chunk):
    plain = in_chunks(make_recipe, case, "auto", accumulation=1)
    # A row in one chunk is the plain program.
    rounding = ROUNDING if chunk < WHOLE or case == "prompt" else 0.0
    assert_equal(in_chunks(make_recipe, case, chunk, accumulation=1), plain, rounding)


def test_a_chunk_that_is_left_out_would_show(make_recipe):
    """The control: without the labels of one chunk's positions the plain loss and gradient are others."""
    variant, method = CASES["full"]
    state = start_state(make_recipe(variant, method=method, precision=FP64, batch={"global_examples": ROWS}))
    labels = BATCH.labels.copy()
    labels[:, 4 * CHUNK + 1 : 5 * CHUNK + 1] = IGNORED
    less = replace(BATCH, labels=labels)
    assert less.target_tokens < BATCH.target_tokens
    assert eval_step(state, less)[0] < (1 - 1e-3) * eval_step(state, BATCH)[0]


@pytest.mark.full
def test_masks_of_the_wrong_positions_would_show(make_recipe, monkeypatch):
    """The control of dropout at an adapted head: every chunk with the masks of the first one's positions."""
    plain = in_chunks(make_recipe, "lora-head", "auto")[1]
    monkeypatch.setattr(importlib.import_module(f"{PROGRAM}.loss_chunks"), "Stretch", lambda *_: None)
    wrong = in_chunks(make_recipe, "lora-head", CHUNK)[1]
    assert furthest(wrong.gradients, plain.gradients) > 1e-3


def test_logits_are_whole_all_the_same(make_recipe):
    """Who asks for logits gets those of every position, also after a loss was made in chunks."""
    variant, method = CASES["full"]
    recipe = make_recipe(
        variant, method=method, precision=FP64, batch={"global_examples": ROWS}, plan={"loss_chunk": CHUNK}
    )
    state = start_state(recipe)
    before = eval_step(state, BATCH)[0]
    made = logits(state, BATCH)
    assert made.shape[:2] == (ROWS, TOKENS)
    wide = made[:, :-1] - np.log(np.exp(made[:, :-1]).sum(-1, keepdims=True))
    targets = BATCH.labels[:, 1:]
    picked = np.take_along_axis(wide, np.where(targets == IGNORED, 0, targets)[..., None], -1)[..., 0]
    assert before == pytest.approx(-picked[targets != IGNORED].sum(), rel=ROUNDING)


@pytest.mark.full
def test_recorded_activations_are_those_of_the_plain_loss(make_recipe):
    variant, method = CASES["full"]
    found = []
    for chunk in ("auto", CHUNK):
        recipe = make_recipe(
            variant,
            method=method,
            precision=FP64,
            batch={"global_examples": ROWS},
            plan={"loss_chunk": chunk},
        )
        found.append(train_step(start_state(recipe), BATCH, lr=0.0, keep="activations")[1])
    plain, chunked = found
    assert furthest(chunked.activations, plain.activations) == 0.0
    assert furthest(chunked.activation_gradients, plain.activation_gradients) == 0.0
    assert chunked.activations["logits"].shape[:2] == (ROWS, TOKENS)
