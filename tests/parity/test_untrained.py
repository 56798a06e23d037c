"""What has no gradient is compared as well: frozen weights, statistics, target networks, counters, weights that rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from parity import Recorder
from parity.cli import main

DRAW = np.random.default_rng(3)
START = {
    "online": DRAW.standard_normal((5, 4)),
    "target": DRAW.standard_normal((5, 4)),
    "frozen": DRAW.standard_normal((8,)),
    "mean": np.zeros(6),
    "count": np.array(0, np.int64),
    "key": np.array([7, 2**32 - 1], np.uint32),
    "mask": np.array([True, False]),
    "rests": DRAW.standard_normal((3, 2)),
}
NAMES = {name: name for name in START}


@dataclass(frozen=True)
class Program:
    """Gradient descent by numpy; `order` sums a statistic in another order, every other field is a mistake."""

    dtype: str = "float64"
    order: bool = False
    decay: float = 0.0
    tau: float = 0.05
    biased: bool = False
    counts: int = 1
    reseeds: bool = False
    forgets_mask: bool = False
    rests_moves: bool = False
    drops: bool = False

    def write(self, directory: Path, steps: int = 4) -> Path:
        """Its trace."""
        now = {n: a.astype(self.dtype) if a.dtype.kind == "f" else a.copy() for n, a in START.items()}
        recorder = Recorder(directory, names=NAMES)
        recorder.initial(now)
        one = np.dtype(self.dtype).type
        for step in range(1, steps + 1):
            inputs = np.random.default_rng((5, step)).standard_normal((64, 6)).astype(self.dtype) + one(0.3)
            gradients = {"online": now["online"] * one(0.5)}
            if step % 2:
                gradients["rests"] = now["rests"] * one(0.2)
            for name, gradient in gradients.items():
                now[name] = now[name] - one(0.01) * gradient
            now["target"] = one(1 - self.tau) * now["target"] + one(self.tau) * now["online"]
            now["frozen"] = now["frozen"] * one(1 - self.decay)
            mean = (inputs[::-1] if self.order else inputs).sum(0) / one(63 if self.biased else 64)
            now["mean"] = one(0.9) * now["mean"] + one(0.1) * mean
            now["count"] = now["count"] + self.counts
            now["key"] = now["key"] + np.uint32(2 if self.reseeds else 1)
            if self.forgets_mask:
                now["mask"] = np.array([True, True])
            if self.rests_moves and step == 2:
                now["rests"] = now["rests"] * one(0.999)
            if self.drops and step == 3:
                del gradients["rests"]
            recorder.step(
                batch={"inputs": inputs}, loss_sum=1.0, tokens=1, lr=0.01, gradients=gradients, weights=now,
                moment1=gradients, moment2=gradients,
            )  # fmt: skip
        return directory


def first_divergence(left: Program, right: Program, home: Path) -> dict | None:
    traces = [str(program.write(home / name)) for name, program in (("left", left), ("right", right))]
    code = main(["diff", *traces, "--out", str(home)])
    first = json.loads((home / "verdict.json").read_text())["first_divergence"]
    assert code == (first is not None)
    return first


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_same_statistics_targets_and_counters_pass(dtype: str, tmp_path: Path):
    assert first_divergence(Program(dtype), Program(dtype, order=True), tmp_path) is None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("mistake", "tensor", "step"),
    [
        ({"decay": 1e-5}, "frozen", 1),
        ({"decay": 1e-7}, "frozen", 1),  # as small as the rounding of float32
        ({"tau": 0.0501}, "target", 1),
        ({"biased": True}, "mean", 1),
        ({"counts": 2}, "count", 1),
        ({"reseeds": True}, "key", 1),
        ({"forgets_mask": True}, "mask", 1),
        ({"rests_moves": True}, "rests", 2),
    ],
)
def test_a_change_of_one_side_is_found(dtype: str, mistake: dict, tensor: str, step: int, tmp_path: Path):
    first = first_divergence(Program(dtype), Program(dtype, **mistake), tmp_path)
    assert first is not None
    assert (first["phase"], first["tensor"], first["step"]) == ("change", tensor, step)


def test_a_frozen_weight_that_one_side_decays_is_called_that(tmp_path: Path):
    first = first_divergence(Program(decay=1e-7), Program(), tmp_path)
    assert first is not None
    assert first["reason"] == "frozen in right, which never changes it; changed in left"


def test_a_weight_that_one_side_trains_and_the_other_does_not_is_a_missing_gradient(tmp_path: Path):
    first = first_divergence(Program(), Program(drops=True), tmp_path)
    assert first is not None
    assert (first["phase"], first["tensor"], first["step"]) == ("gradient", "rests", 3)
    assert first["reason"] == "missing in right"
