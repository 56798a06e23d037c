"""Schedules and random bits: plain numbers with independent oracles."""

import json
import math
import subprocess
import sys

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
    if step < warmup:  # it rises by equal steps
        assert rate == pytest.approx(2.0 * step / warmup)
    elif step + 1 < steps:  # after the warm-up it never rises
        assert learning_rate(schedule, peak=2.0, step=step + 1, steps=steps) <= rate


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


ORACLE = """
import json, sys
import torch
from transformers import TrainingArguments, get_constant_schedule_with_warmup
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

def rates(kind, ratio, steps):
    warmup = TrainingArguments(output_dir="unused", warmup_steps=ratio, use_cpu=True).get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    match kind:
        case "constant":
            schedule = get_constant_schedule_with_warmup(optimizer, warmup)
        case "linear":
            schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        case "cosine":
            schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    return [schedule.lr_lambdas[0](step) for step in range(steps)]

print(json.dumps([rates(*case) for case in json.loads(sys.argv[1])]))
"""


def test_warm_up_as_a_share_follows_hugging_face():
    """Every rate of every kind, where the share is a whole number of updates and where it is not."""
    cases = [
        (kind, ratio, steps)
        for kind in ("constant", "linear", "cosine")
        for ratio, steps in ((0.1, 20), (0.03, 100), (0.07, 100), (0.5, 7), (0.001, 5), (0.99, 3), (0.0, 4))
    ]
    command = [sys.executable, "-c", ORACLE, json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for (kind, ratio, steps), theirs in zip(cases, json.loads(done.stdout), strict=True):
        schedule = Schedule(kind=kind, warmup_ratio=ratio)
        ours = [learning_rate(schedule, peak=1.0, step=step, steps=steps) for step in range(steps)]
        assert ours == pytest.approx(theirs, abs=1e-15), (kind, ratio, steps)
    # Rounded down, as is tempting, it is another schedule: 0.07 * 100 is a little more than 7 in floating point.
    assert Schedule(warmup_ratio=0.07).warmup(100) == 8
    assert Schedule(warmup_ratio=0.03).warmup(100) == 3


def test_a_warm_up_is_given_once():
    with pytest.raises(ValueError, match=r"warmup_steps=5 and schedule\.warmup_ratio=0\.1: give one"):
        Schedule(warmup_steps=5, warmup_ratio=0.1)
