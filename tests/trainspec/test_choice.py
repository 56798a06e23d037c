"""The choice of the next token: what is drawn follows the probabilities, and depends on nothing but what it should."""

from __future__ import annotations

import numpy as np
import pytest

from trainspec.errors import UserError
from trainspec.generation.choice import Sampling, choose, probabilities, softmax, uniform

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=2.0, size=12)
# Of a chi-squared distribution with 11 degrees of freedom, exceeded once in 10,000 times.
CHI_SQUARED_11 = 37.37


def draws(sampling: Sampling, count: int = 10_000) -> np.ndarray:
    chosen = [choose(LOGITS, sampling, seen=(), prompt=i, position=7) for i in range(count)]
    return np.bincount(chosen, minlength=len(LOGITS))


def chi_squared(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_ten_thousand_draws_follow_the_softmax():
    counts = draws(Sampling(temperature=1.0))
    assert chi_squared(counts, softmax(LOGITS)) < CHI_SQUARED_11
    # Control: a temperature that is applied twice, or not at all, is seen in as many draws.
    counts = draws(Sampling(temperature=1.2))
    assert chi_squared(counts, softmax(LOGITS / 1.2)) < CHI_SQUARED_11
    assert chi_squared(counts, softmax(LOGITS)) > CHI_SQUARED_11
    assert chi_squared(counts, softmax(LOGITS / 1.44)) > CHI_SQUARED_11


def test_greedy_takes_the_first_of_the_most_probable():
    assert choose(np.array([0.0, 3.0, 3.0, 1.0]), Sampling(), seen=(), prompt=0, position=0) == 1
    assert choose(np.array([-2.0, -1.0]), Sampling(), seen=(), prompt=0, position=0) == 1


def test_a_penalty_is_for_what_is_there_and_lowers_either_sign():
    sampling = Sampling(repetition_penalty=2.0)
    assert choose(np.array([3.0, 2.0]), sampling, seen=(0,), prompt=0, position=1) == 1
    assert choose(np.array([-1.0, -1.5]), sampling, seen=(0, 0), prompt=0, position=2) == 1
    assert choose(np.array([3.0, 2.0]), sampling, seen=(1,), prompt=0, position=1) == 0


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 1e-9}, 1), ({"min_p": 1.0}, 1), ({"top_k": 12}, 12), ({"top_p": 1.0}, 12)],
)
def test_filters_leave_the_most_probable(setting: dict, kept: int):
    shares = probabilities(LOGITS, Sampling(temperature=1.0, **setting))
    assert np.count_nonzero(shares) == kept
    assert set(np.flatnonzero(shares)) == set(np.argsort(LOGITS)[-kept:])
    assert shares.sum() == pytest.approx(1.0)
    drawn = {
        choose(LOGITS, Sampling(temperature=1.0, **setting), seen=(), prompt=i, position=0)
        for i in range(300)
    }
    assert drawn <= set(np.flatnonzero(shares))


def test_a_draw_depends_on_seed_prompt_and_position_alone():
    numbers = {
        uniform(seed, prompt, position) for seed in range(3) for prompt in range(3) for position in range(3)
    }
    assert len(numbers) == 27
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    # A fixed value: another generator would give other texts. The generator's own tests are those of dropout.
    assert uniform(0, 0, 0) == 0.6190855934203346


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(setting: dict):
    name = [*setting][-1].replace("_", "-")
    with pytest.raises(UserError, match=rf"--{name} {[*setting.values()][-1]}: give "):
        Sampling(**setting)


def test_a_filter_without_a_temperature_is_refused():
    with pytest.raises(UserError, match="--top-k: has no effect at temperature 0"):
        Sampling(top_k=5)
