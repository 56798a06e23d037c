"""Activations and their gradients, as a trace keeps them."""

import json

import numpy as np
import pytest
from backend import logits, spec_of, start_state, train_step
from method_sections import sections
from small import recipe_maker
from test_methods import prepare as prepare_method
from test_model import FP64, FULL, LORA, PACKED, prepare

from trainspec.causal import activation_points
from trainspec.data import IGNORED
from trainspec.methods import leading_positions, virtual_tokens
from trainspec.rope import inverse_frequencies

METHODS = pytest.mark.parametrize("method", [FULL, LORA | {"dropout": 0.0}], ids=["full", "lora"])
# One without and one with what a method adds to the layers, one with virtual tokens.
FAST = ("full", "lora", "prefix-projection")
ADDED = sections(
    {"lora": {"targets": r".*(layers\.0\..*(q|down)_proj|lm_head)", "dropout": 0.0}, "dora": {"dropout": 0.0}}
)
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def recorded(model_dirs):
    """The recipe, batch, logits and metrics of an update that keeps activations; equal ones are made once."""
    make, made = recipe_maker(model_dirs), {}

    def run(method, variant="bias", **sections):
        key = json.dumps([method, variant, sections])
        if key not in made:
            recipe = make(variant, method=method, precision=FP64, data=PACKED, **sections)
            state, batch = prepare(recipe)
            expected = logits(state, batch)
            _, metrics = train_step(state, batch, lr=0.0, keep="activations")
            made[key] = recipe, batch, expected, metrics
        return made[key]

    return run


def sizes_of(recipe, batch) -> dict[str, int]:
    """The size of every axis of a point."""
    spec, method = spec_of(recipe), recipe.method
    return {
        "positions": batch.input_ids.shape[1] + leading_positions(method),
        "virtual": virtual_tokens(method),
        "rank": getattr(method, "rank", 0),
        "bottleneck": getattr(method, "bottleneck", 0),
        **{axis: getattr(spec, axis) for axis in ("embed", "kv_heads", "head_dim", "mlp", "vocab")},
    }


@METHODS
def test_the_stream_adds_up(recorded, method):
    recipe, _, expected, metrics = recorded(method)
    layers, found = spec_of(recipe).layers, metrics.activations
    assert np.abs(found["logits"] - expected).max() <= ROUNDING * np.abs(expected).max()
    stream = found["embedding"]
    for i in range(layers):
        stream = stream + found[f"layers.{i}.attention"] + found[f"layers.{i}.mlp"]
        np.testing.assert_allclose(found[f"layers.{i}.block"], stream, atol=ROUNDING)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in ADDED]
)
def test_every_point_of_a_run_is_there_in_its_shape(make_recipe, name):
    recipe = make_recipe("qwen3", method=ADDED[name], precision=FP64, data=PACKED)
    state, batch = prepare_method(recipe) if ADDED[name] != FULL else prepare(recipe)
    _, metrics = train_step(state, batch, lr=0.0, keep="activations")
    points, sizes = activation_points(spec_of(recipe), recipe.method), sizes_of(recipe, batch)
    for arrays in (metrics.activations, metrics.activation_gradients):
        assert list(arrays) == [point.full_name for point in points]
        for point in points:
            array = arrays[point.full_name]
            heads = spec_of(recipe).heads if point.axes[-1] == "head_dim" else None
            width = spec_of(recipe).heads * spec_of(recipe).head_dim
            wanted = [(heads or width) if axis == "heads" else sizes.get(axis) for axis in point.axes]
            if point.name.endswith("lora_B") and point.axes[-1] == "kv_heads":
                wanted[-1] = sizes["kv_heads"] * sizes["head_dim"]
            assert array.shape == (len(batch.input_ids), *wanted), point
            assert array.any(), point


def test_the_points_of_a_layer_are_what_their_names_say(recorded):
    recipe, batch, _, metrics = recorded(FULL, "qwen3")
    state = start_state(recipe)
    from backend import weights_of

    weights, spec, found = weights_of(state, frozen=True), spec_of(recipe), metrics.activations

    def close(point, wanted):
        np.testing.assert_allclose(found[f"layers.1.{point}"], wanted, atol=1e-11)

    def weight(module):
        return weights[f"model.layers.1.{module}.weight"]

    def norm(x, module):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.norm_eps) * weight(module)

    def at(point):
        return found[f"layers.1.{point}"]

    B, S = batch.input_ids.shape
    close("input_norm", norm(found["layers.0.block"], "input_layernorm"))
    for point, module in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        product = at("input_norm") @ weight(f"self_attn.{module}").T
        close(point, product.reshape(B, S, -1, spec.head_dim))
    turns = batch.positions[..., None] * inverse_frequencies(spec, np.float64)
    angles = np.concatenate([turns, turns], axis=-1)[:, :, None]
    for point, letter in (("query", "q"), ("key", "k")):
        close(f"{point}_norm", norm(at(point), f"self_attn.{letter}_norm"))
        first, second = np.split(at(f"{point}_norm"), 2, axis=-1)
        turned = np.concatenate([-second, first], axis=-1)
        close(f"rotated_{point}", at(f"{point}_norm") * np.cos(angles) + turned * np.sin(angles))
    keys, values = (
        np.repeat(at(point), spec.heads // spec.kv_heads, axis=2) for point in ("rotated_key", "value")
    )
    scores = np.einsum("bqhd,bkhd->bhqk", at("rotated_query"), keys) / np.sqrt(spec.head_dim)
    sees = np.tril(batch.segments[:, :, None] == batch.segments[:, None, :])
    shares = np.where(sees[:, None], np.exp(scores), 0.0)
    close("mixed", np.einsum("bhqk,bkhd->bqhd", shares / shares.sum(-1, keepdims=True), values))
    close("attention", at("mixed").reshape(B, S, -1) @ weight("self_attn.o_proj").T)
    close("post_norm", norm(found["layers.0.block"] + at("attention"), "post_attention_layernorm"))
    close("gate", at("post_norm") @ weight("mlp.gate_proj").T)
    close("up", at("post_norm") @ weight("mlp.up_proj").T)
    close("product", at("gate") / (1 + np.exp(-at("gate"))) * at("up"))
    close("mlp", at("product") @ weight("mlp.down_proj").T)


def test_a_gradient_at_a_point_gives_those_of_the_weights_before_it(recorded):
    """The gradient of a matrix is that of its output times its input."""
    recipe, _, _, metrics = recorded(FULL, "qwen3")
    found, backward = metrics.activations, metrics.activation_gradients
    for module, before, after in (
        ("self_attn.q_proj", "input_norm", "query"),
        ("self_attn.k_proj", "input_norm", "key"),
        ("self_attn.v_proj", "input_norm", "value"),
        ("self_attn.o_proj", "mixed", "attention"),
        ("mlp.gate_proj", "post_norm", "gate"),
        ("mlp.up_proj", "post_norm", "up"),
        ("mlp.down_proj", "product", "mlp"),
    ):
        for i in range(spec_of(recipe).layers):
            x, dy = (
                arrays[f"layers.{i}.{point}"].reshape(*arrays["embedding"].shape[:2], -1)
                for arrays, point in ((found, before), (backward, after))
            )
            wanted = metrics.gradients[f"model.layers.{i}.{module}.weight"]
            np.testing.assert_allclose(np.einsum("bto,bti->oi", dy, x), wanted, atol=1e-13)


def test_an_adapter_s_parts(make_recipe):
    method = LORA | {"dropout": 0.0, "targets": ["q_proj", "down_proj"]}
    recipe = make_recipe("bias", method=method, precision=FP64, data=PACKED)
    state, batch = prepare_method(recipe)
    from backend import weights_of

    weights = weights_of(state, frozen=True)
    _, metrics = train_step(state, batch, lr=0.0, keep="activations")
    found, backward = metrics.activations, metrics.activation_gradients
    for module, before, after in (
        ("self_attn.q_proj", "input_norm", "query"),
        ("mlp.down_proj", "product", "mlp"),
    ):
        name = module.rpartition(".")[2]
        a, b = (weights[f"base_model.model.model.layers.0.{module}.lora_{x}.weight"] for x in "AB")
        low, added = (found[f"layers.0.{name}.lora_{x}"] for x in "AB")
        np.testing.assert_allclose(low, found[f"layers.0.{before}"] @ a.T, atol=1e-12)
        np.testing.assert_allclose(added, recipe.method.scale * low @ b.T, atol=1e-12)
        d_added = backward[f"layers.0.{name}.lora_B"]
        np.testing.assert_allclose(d_added, backward[f"layers.0.{after}"].reshape(d_added.shape), atol=1e-15)
        d_low = recipe.method.scale * d_added @ b
        np.testing.assert_allclose(backward[f"layers.0.{name}.lora_A"], d_low, atol=1e-14)


@METHODS
def test_the_gradient_of_the_logits_is_the_softmax_less_the_target(recorded, method):
    _, batch, expected, metrics = recorded(method)
    shares = np.exp(expected - expected.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    targets = np.concatenate([batch.labels[:, 1:], np.full((len(expected), 1), IGNORED)], axis=1)
    wanted = shares - np.eye(shares.shape[-1])[np.maximum(targets, 0)]
    wanted[targets == IGNORED] = 0
    np.testing.assert_allclose(
        metrics.activation_gradients["logits"], wanted / batch.target_tokens, atol=1e-15
    )


@pytest.mark.parametrize(
    "method",
    [pytest.param(FULL, id="full", marks=pytest.mark.full), pytest.param(LORA | {"dropout": 0.0}, id="lora")],
)
def test_neither_microbatches_nor_recomputation_change_them(recorded, method):
    *_, plain = recorded(method)
    *_, split = recorded(method, batch={"accumulation": 4}, plan={"remat": "full"})
    for kind in ("activations", "activation_gradients"):
        for point, array in getattr(plain, kind).items():
            assert np.abs(getattr(split, kind)[point] - array).max() <= ROUNDING * np.abs(array).max(), point
