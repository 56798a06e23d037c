"""The fp32 bound: wide enough for rounding, narrow enough for mistakes, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Q1, SHAPES, Sim, write

from parity.comparison.compare import compare
from parity.comparison.drift import network_drift, partner_drift
from parity.comparison.estimated_bounds import EstimatedBounds, path_roundings, vocabulary
from parity.comparison.pair import Pair
from parity.comparison.structure import Structure
from parity.runs.fixture import METHODS, TINY
from trainspec.causal import causal_order
from trainspec.data import Batch
from trainspec.methods import full_table
from trainspec.trace import StepTrace, Trace, TraceName, TraceWriter

FP32 = Sim(dtype="float32", noise=1e-7, steps=6)


def judged(left: Sim, right: Sim, home):
    pair = Pair(Trace(write(left, home / "a")), Trace(write(right, home / "b")))
    return compare(pair, EstimatedBounds(pair, "fp32"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_rounding_noise_passes_at_every_step(seed, lr, tmp_path):
    comparison = judged(FP32.but(lr=lr), FP32.but(lr=lr, fused=True, noise_seed=seed), tmp_path)
    assert comparison.holds, comparison.first_divergence
    assert comparison.worst["gradient"].used < 0.5
    assert comparison.undetermined < 0.01


def test_a_gradient_that_is_only_noise_leaves_its_update_undetermined(tmp_path):
    """Adam turns it into ±lr: both signs must pass, and be counted."""
    quiet = FP32.but(noiseless_zero=True, steps=2)
    comparison = judged(quiet, quiet.but(noise_seed=1), tmp_path)
    assert comparison.holds, comparison.first_divergence
    assert 0 < comparison.undetermined < 0.02


@pytest.mark.parametrize(
    "mistake",
    [
        {"eps_inside": True},
        {"eps": 1e-6},
        {"betas": (0.9, 0.9985)},
        {"betas": (0.9002, 0.999)},
        {"lr_factor": 1.0001, "logs_true_lr": False},
        {"coupled_decay": True},
        {"no_decay": True},
        {"gradient_factor": (Q1, 1.0002)},
    ],
    ids=str,
)
def test_a_mild_mistake_fails_through_the_noise(mistake, tmp_path):
    assert not judged(FP32, FP32.but(noise_seed=1, **mistake), tmp_path).holds


def rounded(shapes, batch):
    """In float32, for names that no trace describes."""
    return path_roundings(shapes, batch, structure=Structure(), stored=2.0**-24, summed=2.0**-24)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 4096), layers=st.integers(1, 40), tokens=st.integers(1, 8192))
def test_longer_paths_round_more(width, layers, tokens):
    def model(layers, width):
        norms = {f"layers.{i}.input_layernorm.weight": (width,) for i in range(layers)}
        return norms | {f"layers.{i}.self_attn.q_proj.weight": (width, width) for i in range(layers)}

    def whole(layers, width, tokens):
        return rounded(model(layers, width), (2, tokens))

    forward, both = whole(layers, width, tokens)
    assert 0 < forward < both < 1e-6
    assert both < whole(layers + 1, width, tokens)[1]
    assert both < whole(layers, width + 1, tokens)[1]
    assert both < whole(layers, width, tokens + 1)[1]


@pytest.mark.parametrize("window", [(3,), (3, 3), (2, 3, 3)])
def test_a_convolution_rounds_as_often_as_its_window_is_large(window: tuple[int, ...]):
    """Forward as the matrix [out, in · window] that it is, backward over its outputs at each place of the window."""
    places = math.prod(window)
    forward, both = rounded({"conv.weight": (8, 5, *window)}, (1, 1))
    matrix_forward, matrix_both = rounded({"conv.weight": (8, 5 * places)}, (1, 1))
    none_forward, _ = rounded({"bias": (8,)}, (1, 1))
    assert none_forward < forward == matrix_forward
    assert both - forward == pytest.approx(matrix_both - matrix_forward + 8 * (places - 1) / 2 * 2.0**-48)


def shapes_of(method: str) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for p in full_table(TINY, METHODS[method])}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_own_weights_round_as_well(method: str):
    def whole(shapes):
        return rounded(shapes, (2, 64))

    own, model = whole(shapes_of(method)), whole(shapes_of("full"))
    assert vocabulary(shapes_of(method)) == TINY.vocab
    for more, less in zip(own, model, strict=True):
        assert less == more if method == "full" else less < more < 3 * less


def test_an_lstm_rounds_once_more_with_every_virtual_token():
    shapes = shapes_of("ptuning-lstm")
    table = "prompt_encoder.embedding.weight"

    def whole(virtual: int) -> float:
        longer = shapes | {table: (virtual, TINY.embed)}
        return rounded(longer, (2, 64 - virtual))[1]

    assert whole(30) - whole(3) == pytest.approx(3 * (whole(12) - whole(3)))


def test_places_are_in_the_order_of_the_data():
    """Encoder, embedding, an adapter after its input, and the point after the adapter."""
    orders = [causal_order(TINY, METHODS[method]) for method in ("ptuning-lstm", "adapter")]
    names = {p.name for m in ("ptuning-lstm", "adapter") for p in full_table(TINY, METHODS[m])}
    order = [named.name for named in orders[0] if named.role != "point"]
    assert set(order) < names
    at = {name: i for i, name in enumerate(order)}
    first, encoder = "model.layers.0", "prompt_encoder"
    chain = [
        f"{encoder}.embedding.weight",
        f"{encoder}.lstm_head.weight_hh_l0_reverse",
        f"{encoder}.lstm_head.bias_ih_l1",
        f"{encoder}.mlp_head.0.weight",
        f"{encoder}.mlp_head.2.bias",
        "model.embed_tokens.weight",
    ]
    assert [at[name] for name in chain] == sorted(at[name] for name in chain)
    order = [named.name for named in orders[1]]
    at = {name: i for i, name in enumerate(order)}
    chain = [
        "model.embed_tokens.weight",
        f"{first}.self_attn.o_proj.weight",
        f"{first}.attention_adapter.down.weight",
        f"{first}.attention_adapter.up.weight",
        "layers.0.attention",
        f"{first}.mlp.down_proj.weight",
        f"{first}.mlp_adapter.up.bias",
        "layers.0.mlp",
        "lm_head.weight",
    ]
    assert [at[name] for name in chain] == sorted(at[name] for name in chain)
    assert order[-2:] == ["lm_head.weight", "logits"]
    assert Structure(*orders).in_order(names, backward=True)[-1] == f"{encoder}.embedding.weight"


def two_sides(home, starts: dict[str, np.ndarray], moved: dict[str, float]) -> Pair:
    """Two traces of one step from `starts`; every element of the right one's weights is moved by `moved`."""
    empty = Batch(*(np.zeros((1, 4), np.int32) for _ in range(4)), np.zeros(1, np.int32))
    for side in ("a", "b"):
        weights = {n: w + (moved.get(n, 0.0) if side == "b" else 0.0) for n, w in starts.items()}
        writer = TraceWriter(home / side)
        writer.initial(weights, [TraceName(n, "linear" if n in FROZEN else "adapter", 0) for n in starts])
        zero = {name: np.zeros_like(weights[name]) for name in starts if name not in FROZEN}
        writer.step(StepTrace(1, empty, 1.0, 1, 1.0, 1.0, zero, zero, zero, zero))
    return Pair(Trace(home / "a"), Trace(home / "b"))


FROZEN = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")


def test_drift_measures_a_low_rank_pair_against_its_matrix(tmp_path):
    base, names = np.full((4, 4), 2.0), ("lora_A", "lora_B")
    full = {n: f"base_model.model.{FROZEN[0].removesuffix('.weight')}.{n}.weight" for n in names}
    starts = {FROZEN[0]: base, full["lora_A"]: np.full((1, 4), 0.5), full["lora_B"]: np.full((4, 1), 1.0)}
    pair = two_sides(tmp_path, starts, {full["lora_B"]: 0.125})
    # |ΔB| = 0.25, |A| = 1, |W| = 8, alpha / rank = 2, forward and backward.
    assert network_drift(pair, 1, lora_scale=2.0) == pytest.approx(2 * 2.0 * 0.25 * 1.0 / 8.0)
    assert partner_drift(pair, 1, full["lora_A"]) == pytest.approx(0.25 / (1.125 * 2))
    assert partner_drift(pair, 1, full["lora_B"]) == 0
    assert partner_drift(pair, 1, next(iter(SHAPES))) == 0


def test_drift_measures_a_bottleneck_adapter_against_the_identity(tmp_path):
    at = "model.layers.0.mlp_adapter"
    starts = {
        FROZEN[1]: np.full((4, 4), 2.0),
        f"{at}.down.weight": np.full((1, 4), 0.5),
        f"{at}.down.bias": np.full(1, 0.5),
        f"{at}.up.weight": np.full((4, 1), 1.5),
        f"{at}.up.bias": np.full(4, 0.5),
    }
    # |Δ| of each, what it is multiplied by (the other matrix, for the inner bias too), and what it is added to.
    cases = {
        "down.weight": (0.25, 3.0, 2.0), "down.bias": (0.125, 3.0, 8.0),
        "up.weight": (0.25, 1.0, 2.0), "up.bias": (0.25, 1.0, 8.0),
    }  # fmt: skip
    for name, (apart, times, size) in cases.items():
        pair = two_sides(tmp_path / name, starts, {f"{at}.{name}": 0.125})
        assert network_drift(pair, 1, lora_scale=7.0) == pytest.approx(2 * apart * times / size)
    pair = two_sides(tmp_path / "partner", starts, {f"{at}.up.weight": 0.125})
    for name, moves in (("down.weight", True), ("down.bias", True), ("up.weight", False), ("up.bias", False)):
        expected = 0.25 / (1.625 * 2) if moves else 0.0
        assert partner_drift(pair, 1, f"{at}.{name}") == pytest.approx(expected)


def test_drift_measures_an_lstm_s_bias_against_its_weight(tmp_path):
    head = "prompt_encoder.lstm_head"
    starts = {f"{head}.weight_ih_l0": np.full((4, 4), 2.0), f"{head}.bias_ih_l0": np.full(4, 1.0)}
    pair = two_sides(tmp_path, starts, {f"{head}.bias_ih_l0": 0.5})
    assert network_drift(pair, 1, lora_scale=1.0) == pytest.approx(2 * 1.0 / 8.0)
