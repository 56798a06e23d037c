"""Each planted pattern gets its reading, and a difference without a pattern gets none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import Q1, SHAPES, Sim, batch, write

from parity.comparison.compare import compare
from parity.comparison.pair import Pair
from parity.comparison.tolerance import ProofBounds
from parity.report.diagnosis import UNKNOWN, read
from trainspec.data import Batch
from trainspec.trace import StepTrace, Trace, TraceWriter

E = 6
NORM = "model.norm.weight"


def packed_and_padded() -> Batch:
    """Four examples of sixteen tokens: one whole document, two packed ones, and two with padding at the end."""
    plain = batch(Sim(), 1)
    segments = np.ones((4, 16), np.int32)
    segments[1, 9:] = 2
    segments[2:, 11:] = 0
    positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    positions[1, 9:] -= 9
    positions[2:, 11:] = 0
    labels = np.where(segments == 0, -100, plain.labels).astype(np.int32)
    return replace(plain, segments=segments, positions=positions, labels=labels)


def leave(home: Path, **changes) -> Trace:
    """A step of `packed_and_padded` with activations."""
    random, writer = np.random.default_rng(0), TraceWriter(home)
    tensors = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    writer.initial(tensors)
    points = {p: random.standard_normal((4, 16, E)) for p in ("layers.0.attention", "layers.0.mlp")}
    points["layers.1.attention"] = random.standard_normal((4, 2 + 16, E))  # two virtual tokens in front
    groups = {
        g: {n: w.copy() for n, w in tensors.items()} for g in ("gradients", "updates", "moment1", "moment2")
    }
    step = StepTrace(
        1, packed_and_padded(), 60.0, 60, 1.0, 1e-3, **groups, activations=points,
        activation_gradients={p: a.copy() for p, a in points.items()},
    )  # fmt: skip
    writer.step(replace(step, **{name: change(getattr(step, name)) for name, change in changes.items()}))
    return Trace(home)


def reading(home: Path, *, counts=None, **changes) -> str | None:
    traces = leave(home / "a"), leave(home / "b", **changes)
    pair = Pair(*traces)
    comparison = compare(pair, ProofBounds(pair))
    assert comparison.holds == (not changes)
    return read(comparison, traces, counts=counts)


def noise(shape, seed: int = 5) -> np.ndarray:
    return 1e-3 * np.random.default_rng(seed).standard_normal(shape)


def at(where: np.ndarray, point: str = "layers.0.attention"):
    """Noise in the activations, in proportion to `where`."""
    return lambda arrays: arrays | {point: arrays[point] + noise(arrays[point].shape) * where[:, :, None]}


def in_tensors(names, change):
    return lambda arrays: {n: change(a) if n in names else a for n, a in arrays.items()}


def all_noise(array: np.ndarray) -> np.ndarray:
    return array + noise(array.shape)


SEGMENTS = packed_and_padded().segments
AFTER_VIRTUAL = np.pad(SEGMENTS, ((0, 0), (2, 0)), constant_values=-1)
PATTERNS = {
    "factor": ({"gradients": in_tensors(SHAPES, lambda g: g * 1.25)}, "1.25 times left: a normalisation or a scale"),
    "tokens to examples": (
        {"gradients": in_tensors(SHAPES, lambda g: g * (packed_and_padded().target_tokens / 4))},
        "(target tokens / examples)",
    ),
    "padding": ({"activations": at(SEGMENTS == 0)}, "only on padded positions"),
    "padded examples": ({"activations": at((SEGMENTS == 0).any(axis=1, keepdims=True) & (SEGMENTS >= 0))}, "examples that have padding"),
    "boundary": ({"activations": at(SEGMENTS == 2)}, "after a document's boundary"),
    "virtual": ({"activations": at(AFTER_VIRTUAL < 0, "layers.1.attention")}, "only on virtual tokens"),
    "padding after virtual": (
        {"activations": at(AFTER_VIRTUAL == 0, "layers.1.attention")}, "only on padded positions",
    ),
    "position": ({"activations": at(packed_and_padded().positions.astype(float))}, "grows with the position"),
    "one family": (
        {"gradients": in_tensors({n for n in SHAPES if "q_proj" in n}, all_noise)},
        "only model.layers.*.self_attn.q_proj.weight: that operation",
    ),
    "decay mask": ({"updates": in_tensors({NORM}, lambda u: u + 1e-3)}, "only norms and biases"),
    "decay": ({"updates": in_tensors(set(SHAPES) - {NORM}, all_noise)}, "every weight but norms and biases"),
    "no update": ({"updates": in_tensors({Q1}, np.zeros_like)}, "right made no update"),
    "order": ({"batch": lambda b: replace(b, input_ids=b.input_ids[::-1].copy())}, "another order"),
    "positions": ({"batch": lambda b: replace(b, positions=b.positions + 1)}, "only the positions differ"),
    "labels": ({"batch": lambda b: replace(b, labels=np.roll(b.labels, 1, axis=1))}, "only the labels differ"),
}  # fmt: skip
NO_PATTERN = {
    "noise in every gradient": {"gradients": in_tensors(SHAPES, all_noise)},
    "noise everywhere": {"activations": at(np.ones((4, 16)))},
    "one loss": {"loss_sum": lambda loss: loss * 1.0371},
    "another example": {"batch": lambda b: replace(b, input_ids=(b.input_ids + 1) % 32)},
    "noise in every update": {"updates": in_tensors(SHAPES, all_noise)},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_planted_pattern_is_read(name: str, tmp_path: Path):
    changes, words = PATTERNS[name]
    assert words in str(reading(tmp_path, **changes))


@pytest.mark.parametrize("name", NO_PATTERN)
def test_nothing_is_read_into_a_difference_without_a_pattern(name: str, tmp_path: Path):
    assert reading(tmp_path, **NO_PATTERN[name]) == UNKNOWN


def test_a_comparison_that_holds_has_no_reading(tmp_path: Path):
    assert reading(tmp_path) is None


def test_a_count_of_the_recipe_is_named(tmp_path: Path):
    changes = {"gradients": in_tensors(SHAPES, lambda g: g / 4)}
    assert "1 / accumulation" in str(
        reading(tmp_path / "x", counts={"accumulation": 4.0, "rank": 8.0}, **changes)
    )
    assert "accumulation" not in str(reading(tmp_path / "y", counts={"rank": 8.0}, **changes))


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"clip": 1e9}, "the clip"),
        ({"lr_factor": 1.01}, "the learning rate"),
        ({"betas": (0.9, 0.99)}, "times left: a normalisation or a scale"),
        ({"no_decay": True}, "every weight but norms and biases: the decay"),
    ],
    ids=str,
)
def test_a_run_with_a_mistake_is_read(mistake: dict, words: str, tmp_path: Path):
    traces = [
        Trace(write(Sim().but(**changes), tmp_path / side)) for side, changes in (("a", {}), ("b", mistake))
    ]
    pair = Pair(*traces)
    assert words in str(read(compare(pair, ProofBounds(pair)), (traces[0], traces[1])))
