"""The order in which a Recorder's names are compared: the user's, the map's, the recording's, or by their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity import Recorder
from parity.cli import main
from trainspec.errors import TraceError
from trainspec.trace import Trace

FORWARD = ["wte", *(f"{part}.h.{i}" for i in range(12) for part in ("a", "b")), "ln_f", "head"]


def write(home: Path, names: list[str], *, scaled: tuple[str, ...] = (), **options) -> Path:
    """The trace of one step with every weight in `names`; the gradients of `scaled` are off."""
    weights = {name: np.arange(1.0, 4.0) for name in names}
    recorder = Recorder(home, names={name: name for name in names}, **options)
    recorder.initial(weights)
    gradients = {name: np.ones(3) * (1.1 if name in scaled else 1.0) for name in names}
    points = {point: np.ones(2) for point in ("stem", "body", "end")}
    recorder.step(
        batch={"x": np.ones(2)}, loss_sum=1.0, tokens=1, lr=0.1, gradients=gradients,
        weights={name: weights[name] - 0.1 * gradients[name] for name in names},
        moment1=gradients, moment2=gradients, activations=points, activation_gradients=points,
    )  # fmt: skip
    return home


def first_gradient(home: Path, names: list[str], *scaled: str, **options) -> str:
    left, right = (
        write(home / "left", names, **options),
        write(home / "right", names, scaled=scaled, **options),
    )
    assert main(["diff", str(left), str(right), "--out", str(home)]) == 1
    first = json.loads((home / "verdict.json").read_text())["first_divergence"]
    assert first["phase"] == "gradient"
    return first["tensor"]


def test_gradients_are_walked_backwards_through_the_order_of_the_map(tmp_path: Path, capsys):
    assert first_gradient(tmp_path, FORWARD, "wte", "b.h.2", "a.h.10") == "a.h.10"
    assert "causal_order" not in capsys.readouterr().out


def test_an_alphabetical_map_tells_nothing_and_layers_go_by_number(tmp_path: Path, capsys):
    names = sorted(f"h.{i}.w" for i in range(12))
    assert first_gradient(tmp_path, names, "h.2.w", "h.10.w") == "h.10.w"
    assert "neither trace has a causal_order for 12" in capsys.readouterr().out


def test_numbers_in_other_names_are_numbers_too(tmp_path: Path):
    assert first_gradient(tmp_path, sorted(f"conv{i}" for i in range(12)), "conv2", "conv10") == "conv10"


def test_the_users_order_goes_before_all(tmp_path: Path):
    assert first_gradient(tmp_path, ["a", "b", "c"], "a", "c", order=["c", "b", "a"]) == "a"


def test_activation_points_come_in_the_order_of_recording(tmp_path: Path):
    trace = Trace(write(tmp_path, FORWARD))
    assert [named.name for named in trace.causal_order()] == [*FORWARD, "stem", "body", "end"]


def test_a_name_twice_in_the_order_is_an_error(tmp_path: Path):
    with pytest.raises(TraceError, match="order: 'a' is listed twice"):
        Recorder(tmp_path, names={"a": "a"}, order=["a", "a"])
