"""Schedules and random bits: plain numbers with independent oracles."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainspec.rng import drop_threshold, fold, name_key, threefry2x32
from trainspec.schedule import Schedule, learning_rate


def test_threefry_known_answers():
    # Random123's published vectors for threefry2x32, 20 rounds.
    for key, counter, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = threefry2x32(key, np.array([counter[0]], np.uint32), np.array([counter[1]], np.uint32))
        assert (int(words[0][0]), int(words[1][0])) == expected


def test_keys_differ_by_every_part():
    keys = {
        name_key(0, "a", "b"),
        name_key(1, "a", "b"),
        name_key(0, "ab"),
        name_key(0, "b", "a"),
        fold((1, 2), 3),
        fold((1, 2), 4),
    }
    assert len(keys) == 6


def test_drop_share():
    words, _ = threefry2x32(
        name_key(0, "x"), np.arange(200_000, dtype=np.uint32), np.zeros(200_000, np.uint32)
    )
    assert abs((words < drop_threshold(0.1)).mean() - 0.1) < 3e-3


@given(
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    final=st.floats(0, 1),
    step=st.integers(0, 400),
)
def test_rate_stays_between_zero_and_the_peak(kind, warmup, steps, final, step):
    schedule = Schedule(kind=kind, warmup_steps=warmup, final_ratio=final)
    rate = learning_rate(schedule, peak=2.0, step=step, steps=steps)
    assert 0 <= rate <= 2.0


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("constant", 0, 0.0),
        ("constant", 3, 0.75),
        ("constant", 99, 1.0),
        ("linear", 4, 1.0),
        ("linear", 9, 0.5),
        ("linear", 14, 0.0),
        ("cosine", 9, 0.5),
        ("cosine", 6, 0.5 * (1 + math.cos(math.pi * 0.2))),
        ("cosine", 20, 0.0),
    ],
)
def test_rates_by_hand(kind, step, expected):
    assert learning_rate(Schedule(kind=kind, warmup_steps=4), peak=1.0, step=step, steps=14) == pytest.approx(
        expected, abs=1e-15
    )
