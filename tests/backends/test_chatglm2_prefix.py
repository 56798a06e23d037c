"""P-Tuning v2 as published with ChatGLM2: loss and gradient of a step against a forward pass written from its facts alone.

Positions start at 0, the prefix is visible to all, its projection is as wide as all keys and values, and dropout takes
elements of every example's keys and values.
"""

from __future__ import annotations

from dataclasses import replace

import chatglm2
import numpy as np
import pytest
from backend import restore, start_state, train_step, weights_of
from small import write_tokenizer

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.data import IGNORED, open_dataset
from trainspec.init import initial_value
from trainspec.methods import adapter_table
from trainspec.params import Normal
from trainspec.rng import drop_threshold, fold, name_key, threefry2x32
from trainspec.runs.run import resolve

METHOD = {"kind": "prefix", "virtual_tokens": 3, "positions": "from_zero", "dropout": 0.25}
PROJECTED = METHOD | {"projection": True, "projected": "all_layers"}
LAYERS, GROUPS, WIDTH = 3, 2, 12


def dropped(prefix: np.ndarray, row: int, *, rate: float, step: int = 0) -> np.ndarray:
    """The prefix of one example: the masks of layer i's keys and values are drawn by (row, virtual token) and (head, dim)."""
    result = prefix.copy()
    for at in range(2 * LAYERS):
        key = fold(name_key(0, "dropout", f"prompt_encoder.{at // 2}.{('key', 'value')[at % 2]}"), step)
        tokens, features = np.meshgrid(np.arange(len(prefix)), np.arange(GROUPS * WIDTH), indexing="ij")
        element = (row * len(prefix) + tokens).astype(np.uint32)
        bits, _ = threefry2x32(key, features.astype(np.uint32), element)
        kept = (bits >= np.uint32(drop_threshold(rate))).reshape(len(prefix), GROUPS, WIDTH)
        result[:, at] = np.where(kept, prefix[:, at] / (1 - rate), 0)
    return result


def loss_of(weights: dict[str, np.ndarray], batch, *, rate: float) -> float:
    """The mean loss of a batch, record by record."""
    made, total = chatglm2.prefix_of(weights), 0.0
    for row, segments in enumerate(batch.segments):
        prefix = dropped(made, int(batch.rows[row]), rate=rate)
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            logits = chatglm2.logits(weights, batch.input_ids[row, at], prefix)
            wide = logits - logits.max(-1, keepdims=True)
            logs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
            labels = batch.labels[row, at]
            total -= sum(logs[i - 1, label] for i, label in enumerate(labels) if label != IGNORED)
    return total / batch.target_tokens


@pytest.mark.parametrize("method", [METHOD, pytest.param(PROJECTED, marks=pytest.mark.full)])
def test_a_step_is_that_of_the_published_method(make_recipe, tmp_path, method):
    model = chatglm2.write_published(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    recipe = make_recipe(
        model={"from": str(tmp_path / "model")},
        method=method,
        precision={"policy": "fp64", "reduce": "fp64"},
        data={"packing": True, "sequence_tokens": 120, "too_long": "cut"},
        batch={"global_examples": 4, "accumulation": 2},
    )
    run = resolve(recipe)
    table = adapter_table(run.spec, recipe.method)
    drawn = {p.name: initial_value(replace(p, init=Normal(0.4)), seed=4, dtype="float64") for p in table}
    zeros = {name: np.zeros_like(array) for name, array in drawn.items()}
    state = restore(start_state(recipe), Checkpoint(0, drawn, zeros, zeros))
    batch = open_dataset(run, "train").batch(0, 4)
    state, metrics = train_step(state, batch, lr=0.0, keep="gradients")

    def whole(encoder: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {name.replace("prompt_encoder.transform.", "x.trans."): w for name, w in encoder.items()}
        named = {
            name.replace("prompt_encoder", "x").replace("x.", "transformer.prefix_encoder."): w
            for name, w in named.items()
        }
        return {name: w.astype(np.float64) for name, w in model.items()} | named

    mine = metrics.loss_sum / metrics.tokens
    assert mine == pytest.approx(loss_of(whole(drawn), batch, rate=0.25), rel=1e-13)
    rng, h = np.random.default_rng(0), 1e-3
    direction = {name: rng.standard_normal(w.shape) for name, w in drawn.items()}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))

    def moved(at: float) -> float:
        weights = {name: w + at * direction[name] / length for name, w in drawn.items()}
        return loss_of(whole(weights), batch, rate=0.25)

    slope = sum((metrics.gradients[name] * d).sum() for name, d in direction.items()) / length
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert slope == pytest.approx(difference, abs=1e-9)
    assert abs(slope) > 1e-5
    assert set(metrics.gradients) == set(drawn) == set(weights_of(state))
    # Controls: without dropout, or with every example's mask that of the first, it is another loss.
    assert mine != pytest.approx(loss_of(whole(drawn), batch, rate=0.0), rel=1e-9)
    same = replace(batch, rows=np.zeros_like(batch.rows))
    assert mine != pytest.approx(loss_of(whole(drawn), same, rate=0.25), rel=1e-9)
