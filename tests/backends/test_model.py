"""The float64 model against an independent numpy Llama; the mapping of names against THE TABLE."""

from dataclasses import replace

import numpy as np
import numpy_llama
import pytest
from backend import logits, spec_of, start_state, train_step, weights_of
from small import VARIANTS

from trainspec import init
from trainspec.data import open_dataset
from trainspec.from_text import keys_and_values
from trainspec.init import starting_weights
from trainspec.methods import DoRA
from trainspec.rope import YarnScaling
from trainspec.runs.run import resolve

FP64 = {"policy": "fp64", "reduce": "fp64"}
# Long enough for rows of several documents.
PACKED = {"packing": True, "sequence_tokens": 320}
FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.2, "targets": "all-linear"}
# About a thousand roundings of 1e-16 in a row: two layers of sums of at most 48 products.
FP64_ROUNDING = 1e-12
# The fast tests have the families whose forward pass is another one.
LONG = ("yarn-rope", "qwen2", "chatglm2")
SOME_FULL = [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in VARIANTS]


def prepare(recipe):
    return start_state(recipe), open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)


def worst_logit(state, batch, weights, *, spec, lora_scale=0.0):
    mine = logits(state, batch)
    found = []
    for example, where in numpy_llama.documents(batch):
        ids = batch.input_ids[example, where]
        theirs = numpy_llama.document_logits(weights, spec, ids, lora_scale=lora_scale)
        found.append(np.abs(mine[example, where] - theirs).max() / np.abs(theirs).max())
    return np.max(found)  # unlike max, NaN where one is


@pytest.mark.parametrize("variant", SOME_FULL)
def test_packed_logits_are_those_of_each_document_alone(make_recipe, variant):
    recipe = make_recipe(variant, method=FULL, precision=FP64, data=PACKED)
    state, batch = prepare(recipe)
    assert (batch.segments.max(axis=1) > 1).any()
    assert logits(state, batch).dtype == np.float64
    assert worst_logit(state, batch, weights_of(state), spec=spec_of(recipe)) < FP64_ROUNDING


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_are_those_of_each_document_alone(make_recipe, side):
    recipe = make_recipe(method=FULL, precision=FP64, data={"padding_side": side})
    state, batch = prepare(recipe)
    assert (batch.segments == 0).any()
    assert worst_logit(state, batch, weights_of(state), spec=spec_of(recipe)) < FP64_ROUNDING


def test_trained_adapters_act_as_merged_ones(make_recipe):
    recipe = make_recipe("bias", method=LORA, precision=FP64, data=PACKED, optimizer={"lr": 1e-2})
    state, batch = prepare(recipe)
    for _ in range(2):
        state, _ = train_step(state, batch, lr=1e-2)
    weights, scale = weights_of(state, frozen=True), recipe.method.scale
    assert worst_logit(state, batch, weights, spec=spec_of(recipe), lora_scale=scale) < FP64_ROUNDING
    assert (
        worst_logit(state, batch, weights, spec=spec_of(recipe), lora_scale=1.01 * scale) > 1e-6
    )  # negative control


@pytest.mark.parametrize("variant", SOME_FULL)
def test_a_text_leaves_the_keys_and_values_that_are_read_after_it(make_recipe, variant):
    recipe = make_recipe(variant, method=FULL, precision=FP64)
    spec = spec_of(recipe)
    weights = {p.name: weight[...].astype(np.float64) for p, weight in starting_weights(resolve(recipe))}
    text, rest = [5, 71, 230, 9], [17, 300, 4]
    prefix = keys_and_values(spec, weights, text)
    found = numpy_llama.document_logits(weights, spec, rest, prefix=prefix)
    wanted = numpy_llama.document_logits(weights, spec, text + rest)[len(text) :]
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < FP64_ROUNDING


@pytest.mark.parametrize("change", [{"norm_eps": 1.01e-5}, {"rope_theta": 1.0001e4}, {"kv_heads": 1}])
def test_the_oracle_notices(make_recipe, change):
    """Negative control: a small change of the model is far outside the bound."""
    recipe = make_recipe(method=FULL, precision=FP64)
    state, batch = prepare(recipe)
    spec = replace(spec_of(recipe), **change)
    assert worst_logit(state, batch, weights_of(state), spec=spec) > 1e3 * FP64_ROUNDING


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("mistral", {"window": 15}),
        ("mistral", {"window": None}),
        ("smollm3", {"unrotated": ()}),
        ("smollm3", {"unrotated": (0,)}),
        ("glm", {"family": "llama-pairs"}),
        ("yarn-rope", {"rope_scaling": None}),
        ("yarn-rope", {"rope_scaling": YarnScaling(4.0, 128, 32.0, 1.0, 1.0, True)}),
    ],
)
@pytest.mark.full
def test_the_oracle_notices_what_a_family_changes(make_recipe, monkeypatch, variant, change):
    recipe = make_recipe(variant, method=FULL, precision=FP64, data=PACKED)
    state, batch = prepare(recipe)
    if change == {"family": "llama-pairs"}:
        rotated = numpy_llama.rotated
        monkeypatch.setattr(
            numpy_llama, "rotated", lambda x, spec, first=0: rotated(x, replace(spec, family="llama"), first)
        )
        change = {}
    spec = replace(spec_of(recipe), **change)
    assert worst_logit(state, batch, weights_of(state), spec=spec) > 1e3 * FP64_ROUNDING


@pytest.mark.full
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_of_padded_rows_is_that_of_each_document_alone(make_recipe, side):
    recipe = make_recipe("mistral", method=FULL, precision=FP64, data={"padding_side": side})
    state, batch = prepare(recipe)
    assert (batch.segments == 0).any()
    assert worst_logit(state, batch, weights_of(state), spec=spec_of(recipe)) < FP64_ROUNDING


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("variant", SOME_FULL)
def test_weights_come_back_as_they_went_in(make_recipe, variant, method):
    recipe = make_recipe(variant, method=method, precision=FP64)
    state, _ = prepare(recipe)
    there = {p.name: weight[...] for p, weight in starting_weights(resolve(recipe))}
    back = weights_of(state, frozen=True)
    assert list(back) == list(there)
    for name, array in there.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["prefix", "dora"])
def test_what_starts_from_other_weights_is_computed_once(make_recipe, monkeypatch, kind, policy):
    """In bf16 a backend reads starting values twice: for the weights that it computes with and for the masters."""
    method = {"kind": kind} | ({"init": "text", "text": "what is the answer"} if kind == "prefix" else {})
    calls = []

    def count(owner, name, key):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: calls.append(key(args)) or real(*args, **kw))

    count(init, "text_start", lambda _: "text")
    count(DoRA, "row_norms", lambda args: args[1].tobytes())  # one call for each target, known by its weight
    start_state(make_recipe(method=method, precision={"policy": policy}))
    assert len(calls) == (1 if kind == "prefix" else 4)
    assert len(set(calls)) == len(calls)
