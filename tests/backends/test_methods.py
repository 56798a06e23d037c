"""Every method in float64 against the independent numpy Llama: its logits, and its gradient along a random direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy_llama
import pytest
from backend import logits, moments_of, restore, spec_of, start_state, train_step, weights_of
from method_oracles import ORACLES
from method_sections import sections

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.data import open_dataset
from trainspec.init import initial_value
from trainspec.methods import adapter_table
from trainspec.model import ModelSpec
from trainspec.params import Normal
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

FP64 = {"policy": "fp64", "reduce": "fp64"}
# Every example of the registry but full training, and what else a method may be set to.
METHODS = sections(
    {
        "lora": {"rank": 3, "alpha": 5.0, "rslora": True, "dropout": 0.0, "targets": "all-linear"},
        "dora": {"rank": 3, "alpha": 5.0, "dropout": 0.0},
        "adapter": {"bottleneck": 5},
        "ptuning-mlp": {"hidden": 7},
        "ptuning-lstm": {"virtual_tokens": 4, "hidden": 6, "dropout": 0.0},
        "prefix-projection": {"hidden": 5},
    }
) | {f"adapter-{act}": {"kind": "adapter", "bottleneck": 5, "activation": act} for act in ("relu", "silu")}
METHODS["prefix-from-zero"] = {"kind": "prefix", "virtual_tokens": 3, "positions": "from_zero"}
del METHODS["full"]  # see test_model.py
DATA = {
    "packed": {"packing": True, "sequence_tokens": 320},
    "left": {"padding_side": "left"},
    "right": {"padding_side": "right"},
}
# The model and how its examples are filled, where that is not ("plain", "packed").
FILLED = {
    "lora": ("bias", "packed"),
    "dora": ("bias", "left"),
    "adapter-relu": ("bias", "left"),
    "adapter-silu": ("plain", "right"),
    "prompt": ("tied", "packed"),
    "ptuning-mlp": ("plain", "left"),
    "prefix": ("llama3-rope", "packed"),
    "prefix-projection": ("tied", "left"),
    "prefix-from-zero": ("mistral", "packed"),  # not even a window hides it
}
CASES = [(name, *FILLED.get(name, ("plain", "packed"))) for name in METHODS]
FAST = ("dora", "adapter", "ptuning-lstm", "prefix")  # one of each way into the model
ROUNDING = 1e-12  # as in test_model.py


def prepare(recipe: Recipe):
    """A run whose adapter is drawn, so that none of its weights is zero, and its batch."""
    state = start_state(recipe)
    rows = adapter_table(spec_of(recipe), recipe.method)
    drawn = {p.name: initial_value(replace(p, init=Normal(0.3)), seed=4, dtype="float64") for p in rows}
    zeros = {name: np.zeros_like(array) for name, array in drawn.items()}
    state = restore(state, Checkpoint(0, drawn, zeros, zeros))
    return state, open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)


def in_the_oracle(recipe: Recipe, spec: ModelSpec, weights, held) -> dict[str, Any]:
    """What numpy_llama is told of the method."""
    return ORACLES[recipe.method.kind](recipe.method, spec, weights, held)


def _marked(case: tuple[str, str, str]):
    return pytest.param(case, id="-".join(case), marks=[] if case[0] in FAST else [pytest.mark.full])


@pytest.fixture(params=map(_marked, CASES))
def prepared(make_recipe, request):
    name, variant, data = request.param
    recipe = make_recipe(variant, method=METHODS[name], precision=FP64, data=DATA[data])
    return recipe, *prepare(recipe)


def test_a_method_is_that_of_the_papers(prepared):
    """Logits of every document, and the slope of the loss along a random direction: differences of fourth order."""
    recipe, state, batch = prepared
    spec, weights = spec_of(recipe), weights_of(state, frozen=True)
    mine, how = logits(state, batch), in_the_oracle(recipe, spec, weights, weights)
    for example, where in numpy_llama.documents(batch):
        theirs = numpy_llama.document_logits(weights, spec, batch.input_ids[example, where], **how)
        assert np.abs(mine[example, where] - theirs).max() <= ROUNDING * np.abs(theirs).max()

    rng, h = np.random.default_rng(0), 1e-4
    trained = weights_of(state)
    direction = {name: rng.standard_normal(w.shape) for name, w in trained.items()}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))

    def loss(at: float) -> float:
        moved = weights | {name: w + at * direction[name] / length for name, w in trained.items()}
        how = in_the_oracle(recipe, spec, moved, weights)
        return numpy_llama.loss_sum(moved, spec, batch, **how) / batch.target_tokens

    state, metrics = train_step(state, batch, lr=0.0, keep="gradients")
    slope = sum((metrics.gradients[name] * d).sum() for name, d in direction.items()) / length
    assert metrics.loss_sum / metrics.tokens == pytest.approx(loss(0.0), rel=1e-13)
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert slope == pytest.approx(difference, abs=1e-9)
    assert set(metrics.gradients) == set(trained) == set(moments_of(state)[0])  # and nothing else is trained
