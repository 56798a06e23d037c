"""The fp32 bound: wide enough for rounding, narrow enough for mistakes, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Q1, SHAPES, Sim, write

from parity.compare import compare
from parity.drift import network_drift, partner_drift
from parity.pair import Pair
from parity.rounding import RoundingBounds, path_roundings
from trainspec.data import Batch
from trainspec.trace import StepTrace, Trace, TraceWriter

FP32 = Sim(dtype="float32", noise=1e-7, steps=6)


def judged(left: Sim, right: Sim, home):
    pair = Pair(Trace(write(left, home / "a")), Trace(write(right, home / "b")))
    return compare(pair, RoundingBounds(pair, "fp32"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_rounding_noise_passes_at_every_step(seed, lr, tmp_path):
    comparison = judged(FP32.but(lr=lr), FP32.but(lr=lr, fused=True, noise_seed=seed), tmp_path)
    assert comparison.holds, comparison.first_divergence
    assert comparison.worst["gradient"].used < 0.5
    assert comparison.undetermined < 0.01


def test_a_gradient_that_is_only_noise_leaves_its_update_undetermined(tmp_path):
    """Adam makes ±lr of it: both signs must pass, and be counted."""
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


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 4096), layers=st.integers(1, 40), tokens=st.integers(1, 8192))
def test_longer_paths_round_more(width, layers, tokens):
    def model(layers, width):
        norms = {f"layers.{i}.input_layernorm.weight": (width,) for i in range(layers)}
        return norms | {f"layers.{i}.self_attn.q_proj.weight": (width, width) for i in range(layers)}

    def whole(layers, width, tokens):
        return path_roundings(model(layers, width), (2, tokens), stored=2.0**-24, summed=2.0**-24)

    forward, both = whole(layers, width, tokens)
    assert 0 < forward < both < 1e-6
    assert both < whole(layers + 1, width, tokens)[1]
    assert both < whole(layers, width + 1, tokens)[1]
    assert both < whole(layers, width, tokens + 1)[1]


def test_drift_measures_a_low_rank_pair_against_its_matrix(tmp_path):
    base, names = np.full((4, 4), 2.0), ("lora_A", "lora_B")
    full = {n: f"base_model.model.model.layers.0.self_attn.q_proj.{n}.weight" for n in names}
    empty = Batch(*(np.zeros((1, 4), np.int32) for _ in range(4)), np.zeros(1, np.int32))
    traces = []
    for side, moved in (("a", 0.0), ("b", 0.125)):
        pair_of = {full["lora_A"]: np.full((1, 4), 0.5), full["lora_B"]: np.full((4, 1), 1.0) + moved}
        writer = TraceWriter(tmp_path / side)
        writer.initial({"model.layers.0.self_attn.q_proj.weight": base} | pair_of)
        zero = {name: np.zeros_like(w) for name, w in pair_of.items()}
        writer.step(StepTrace(1, empty, 1.0, 1, 1.0, 1.0, zero, zero, zero, zero))
        traces.append(Trace(tmp_path / side))
    pair = Pair(*traces)
    # |ΔB| = 0.25, |A| = 1, |W| = 8, alpha / rank = 2, forward and backward.
    assert network_drift(pair, 1, lora_scale=2.0) == pytest.approx(2 * 2.0 * 0.25 * 1.0 / 8.0)
    assert partner_drift(pair, 1, full["lora_A"]) == pytest.approx(0.25 / (1.125 * 2))
    assert partner_drift(pair, 1, full["lora_B"]) == 0
    assert partner_drift(pair, 1, next(iter(SHAPES))) == 0
