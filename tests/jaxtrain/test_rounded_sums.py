"""The simulated roundings of a sum are as large as real ones, for terms of one sign too."""

import json
from pathlib import Path

import numpy as np
import pytest
from launch import launch

SUMS, TERMS = 400, 192


def test_simulated_sums_move_as_far_as_real_ones(tmp_path: Path):
    random = np.random.default_rng(0)
    # Numbers of float32: what is rounded are the partial sums alone.
    signed = random.standard_normal((SUMS, TERMS)).astype(np.float32)
    cases = {"random signs": signed, "one sign": np.abs(signed), "mostly one sign": signed + np.float32(0.5)}
    (out,) = launch("rounded_sums.py", {name: terms.tolist() for name, terms in cases.items()}, tmp_path)
    found = json.loads(out.read_text())
    for name, terms in cases.items():
        error = np.cumsum(terms, axis=1, dtype=np.float32)[:, -1] - terms.astype(np.float64).sum(axis=1)
        real = np.sqrt(np.mean(np.square(error)))
        assert found[name]["whole"] == pytest.approx(real, rel=0.2), name
        if name == "one sign":  # what moves terms alone does not show it
            assert found[name]["terms alone"] < real / 5
