"""Activations and their gradients, as a trace keeps them."""

import numpy as np
import pytest
from backend import logits, spec_of, train_step
from test_model import FP64, FULL, LORA, PACKED, prepare

from trainspec.data import IGNORED
from trainspec.trace import activation_points

METHODS = pytest.mark.parametrize("method", [FULL, LORA | {"dropout": 0.0}], ids=["full", "lora"])
ROUNDING = 1e-12


def recorded(make_recipe, method, **sections):
    recipe = make_recipe("bias", method=method, precision=FP64, data=PACKED, **sections)
    state, batch = prepare(recipe)
    expected = logits(state, batch)
    _, metrics = train_step(state, batch, lr=0.0, keep="activations")
    return recipe, batch, expected, metrics


@METHODS
def test_every_point_is_there_and_the_stream_adds_up(make_recipe, method):
    recipe, _, expected, metrics = recorded(make_recipe, method)
    layers = spec_of(recipe).layers
    assert set(metrics.activations) == set(metrics.activation_gradients) == set(activation_points(layers))
    found = metrics.activations
    assert np.abs(found["logits"] - expected).max() <= ROUNDING * np.abs(expected).max()
    stream = found["embedding"]
    for i in range(layers):
        stream = stream + found[f"layers.{i}.attention"] + found[f"layers.{i}.mlp"]
        np.testing.assert_allclose(found[f"layers.{i}.block"], stream, atol=ROUNDING)


@METHODS
def test_the_gradient_of_the_logits_is_the_softmax_less_the_target(make_recipe, method):
    _, batch, expected, metrics = recorded(make_recipe, method)
    shares = np.exp(expected - expected.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    targets = np.concatenate([batch.labels[:, 1:], np.full((len(expected), 1), IGNORED)], axis=1)
    wanted = shares - np.eye(shares.shape[-1])[np.maximum(targets, 0)]
    wanted[targets == IGNORED] = 0
    np.testing.assert_allclose(
        metrics.activation_gradients["logits"], wanted / batch.target_tokens, atol=1e-15
    )


@METHODS
def test_neither_microbatches_nor_recomputation_change_them(make_recipe, method):
    *_, plain = recorded(make_recipe, method)
    *_, split = recorded(make_recipe, method, batch={"accumulation": 4}, plan={"remat": "full"})
    for kind in ("activations", "activation_gradients"):
        for point, array in getattr(plain, kind).items():
            assert np.abs(getattr(split, kind)[point] - array).max() <= ROUNDING * np.abs(array).max(), point
