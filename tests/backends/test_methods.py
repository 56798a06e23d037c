"""Every method in float64 against the independent numpy Llama: its logits, and its gradient along a random direction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy_llama
import pytest
from backend import logits, moments_of, restore, spec_of, start_state, train_step, weights_of

from trainspec.checkpoint import Checkpoint
from trainspec.data import open_dataset
from trainspec.encoders import encode
from trainspec.init import initial_value
from trainspec.methods import ENCODER, Adapter, LoRA, PrefixTuning, Virtual, adapter_table
from trainspec.model import ModelSpec
from trainspec.params import Normal
from trainspec.recipe import Recipe
from trainspec.run import resolve

FP64 = {"policy": "fp64", "reduce": "fp64"}
METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"kind": "lora", "rank": 3, "alpha": 5.0, "rslora": True, "targets": "all-linear"},
    "adapter-relu": {"kind": "adapter", "bottleneck": 5, "activation": "relu"},
    "adapter-gelu": {"kind": "adapter", "bottleneck": 5, "activation": "gelu"},
    "adapter-silu": {"kind": "adapter", "bottleneck": 5, "activation": "silu"},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "ptuning-mlp": {"kind": "ptuning", "virtual_tokens": 3, "hidden": 7},
    "ptuning-lstm": {"kind": "ptuning", "virtual_tokens": 4, "encoder": "lstm", "hidden": 6},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "prefix-projection": {"kind": "prefix", "virtual_tokens": 3, "projection": True, "hidden": 5},
}
DATA = {
    "packed": {"packing": True, "sequence_tokens": 320},
    "left": {"padding_side": "left"},
    "right": {"padding_side": "right"},
}
CASES = [
    ("rslora", "bias", "packed"),
    ("adapter-relu", "bias", "left"),
    ("adapter-gelu", "plain", "packed"),
    ("adapter-silu", "plain", "right"),
    ("prompt", "tied", "packed"),
    ("ptuning-mlp", "plain", "left"),
    ("ptuning-lstm", "plain", "packed"),
    ("prefix", "llama3-rope", "packed"),
    ("prefix-projection", "tied", "left"),
]
FAST = (CASES[2], CASES[6], CASES[7])  # one of each way into the model
ACTS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(x),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
ROUNDING = 1e-12  # as in test_model.py


def prepare(recipe: Recipe):
    """A run whose adapter is drawn, so that none of its weights is zero, and its batch."""
    state = start_state(recipe)
    rows = adapter_table(spec_of(recipe), recipe.method)
    drawn = {p.name: initial_value(replace(p, init=Normal(0.3)), seed=4, dtype="float64") for p in rows}
    zeros = {name: np.zeros_like(array) for name, array in drawn.items()}
    state = restore(state, Checkpoint(0, drawn, zeros, zeros))
    return state, open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)


def in_the_oracle(recipe: Recipe, spec: ModelSpec, weights) -> dict[str, Any]:
    """What numpy_llama is told of the method."""
    match recipe.method:
        case LoRA() as method:
            return {"lora_scale": method.alpha / math.sqrt(method.rank)}
        case Adapter() as method:
            return {"act": ACTS[method.activation]}
    assert isinstance(recipe.method, Virtual)
    made = encode(recipe.method, {name: w for name, w in weights.items() if name.startswith(ENCODER)})
    if isinstance(recipe.method, PrefixTuning):
        return {"prefix": made.reshape(len(made), 2 * spec.layers, spec.kv_heads, spec.head_dim)}
    return {"rows": made}


def _marked(case: tuple[str, str, str]):
    return pytest.param(case, id="-".join(case), marks=[] if case in FAST else [pytest.mark.full])


@pytest.fixture(params=map(_marked, CASES))
def prepared(make_recipe, request):
    name, variant, data = request.param
    recipe = make_recipe(variant, method=METHODS[name], precision=FP64, data=DATA[data])
    return recipe, *prepare(recipe)


def test_a_method_is_that_of_the_papers(prepared):
    """Logits of every document, and the slope of the loss along a random direction: differences of fourth order."""
    recipe, state, batch = prepared
    spec, weights = spec_of(recipe), weights_of(state, frozen=True)
    mine, how = logits(state, batch), in_the_oracle(recipe, spec, weights)
    for example, where in numpy_llama.documents(batch):
        theirs = numpy_llama.document_logits(weights, spec, batch.input_ids[example, where], **how)
        assert np.abs(mine[example, where] - theirs).max() <= ROUNDING * np.abs(theirs).max()

    rng, h = np.random.default_rng(0), 1e-4
    trained = weights_of(state)
    direction = {name: rng.standard_normal(w.shape) for name, w in trained.items()}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))

    def loss(at: float) -> float:
        moved = weights | {name: w + at * direction[name] / length for name, w in trained.items()}
        how = in_the_oracle(recipe, spec, moved)
        return numpy_llama.loss_sum(moved, spec, batch, **how) / batch.target_tokens

    state, metrics = train_step(state, batch, lr=0.0, keep="gradients")
    slope = sum((metrics.gradients[name] * d).sum() for name, d in direction.items()) / length
    assert metrics.loss_sum / metrics.tokens == pytest.approx(loss(0.0), rel=1e-13)
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert slope == pytest.approx(difference, abs=1e-9)
    assert set(metrics.gradients) == set(trained) == set(moments_of(state)[0])  # and nothing else is trained
