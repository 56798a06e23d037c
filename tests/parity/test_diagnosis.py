"""Each planted pattern is seen as a fact, and only where it is; facts lead to causes, and to none where none fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import ROOT
from synthetic import ORDER, Q1, SHAPES, Sim, batch, write

from parity.comparison.compare import compare
from parity.comparison.pair import Pair
from parity.comparison.tolerance import ProofBounds
from parity.diagnosis import Diagnosis, diagnose
from parity.diagnosis.causes import CAUSES
from parity.diagnosis.diagnosis import NAMED
from parity.diagnosis.fact import KINDS, Fact
from parity.diagnosis.facts import logits_gradient as logits_gradient_facts
from parity.diagnosis.facts import settings as settings_facts
from parity.diagnosis.facts.attention import Form, Inputs, _apply
from trainspec.data import Batch
from trainspec.methods import METHODS
from trainspec.plans.plan import Policy
from trainspec.recipe import Recipe
from trainspec.trace import StepTrace, Trace, TraceWriter
from trainspec.trace_header import TraceHeader

E, HEADS, KV, D, VOCAB = 6, 4, 2, 3, 32
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
    writer.initial(tensors, ORDER)
    points = {p: random.standard_normal((4, 16, E)) for p in ("layers.0.attention", "layers.0.mlp")}
    points["layers.1.attention"] = random.standard_normal((4, 2 + 16, E))  # two virtual tokens in front
    points["layers.1.block"] = random.standard_normal((4, 16, E))
    groups = {
        g: {n: w.copy() for n, w in tensors.items()} for g in ("gradients", "updates", "moment1", "moment2")
    }
    norm = float(np.sqrt(sum(np.sum(g**2) for g in groups["gradients"].values())))
    step = StepTrace(
        1, packed_and_padded(), 60.0, packed_and_padded().target_tokens, norm, 1e-3, **groups, activations=points,
        activation_gradients={p: a.copy() for p, a in points.items()},
    )  # fmt: skip
    writer.step(replace(step, **{name: change(getattr(step, name)) for name, change in changes.items()}))
    return Trace(home)


def diagnosis_of(home: Path, *, counts=None, **changes) -> Diagnosis | None:
    traces = leave(home / "a"), leave(home / "b", **changes)
    pair = Pair(*traces)
    comparison = compare(pair, ProofBounds(pair))
    assert comparison.holds == (not changes)
    return diagnose(comparison, traces, counts=counts)


def seen(found: Diagnosis | None) -> dict[str, str]:
    """The words of each kind of fact."""
    assert found
    return {fact.kind: fact.words for fact in found.facts}


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
POSITIONS = packed_and_padded().positions
AFTER_VIRTUAL = np.pad(SEGMENTS, ((0, 0), (2, 0)), constant_values=-1)
REAL = SEGMENTS > 0
EVERYWHERE = {"activations": at(np.ones((4, 16)))}
GRADIENT_NOISE = {"gradients": in_tensors(SHAPES, all_noise)}
UPDATE_NOISE = {"updates": in_tensors(SHAPES, all_noise)}


def rounded(array: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def by_rows(*factors: float):
    """Each example's gradient of an activation times a factor."""
    times = np.array(factors)[:, None, None]
    return lambda arrays: {p: a * times if p == "layers.1.block" else a for p, a in arrays.items()}


def only_rows(rows: slice):
    where = np.zeros((4, 16))
    where[rows] = 1
    return at(where)


# What is planted, the kind of fact that must be seen, and a change in which it must not be.
PATTERNS = {
    "factor": ({"gradients": in_tensors(SHAPES, lambda g: g * 1.25)}, "factor", GRADIENT_NOISE),
    "one factor": ({"gradients": in_tensors(SHAPES, lambda g: g * 1.25)}, "one-factor", GRADIENT_NOISE),
    "a factor of a count": (
        {"gradients": in_tensors(SHAPES, lambda g: g * (packed_and_padded().target_tokens / 4))}, "count-factor",
        {"gradients": in_tensors(SHAPES, lambda g: g * 1.2345)},
    ),
    "padding": ({"activations": at(SEGMENTS == 0)}, "only-padding", EVERYWHERE),
    "padded examples": (
        {"activations": at((SEGMENTS == 0).any(axis=1, keepdims=True) & (SEGMENTS >= 0))}, "only-padded-examples",
        {"activations": only_rows(slice(0, 1))},
    ),
    "boundary": ({"activations": at(SEGMENTS == 2)}, "only-later-documents", EVERYWHERE),
    "virtual": ({"activations": at(AFTER_VIRTUAL < 0, "layers.1.attention")}, "only-virtual", EVERYWHERE),
    "position": ({"activations": at(POSITIONS.astype(float))}, "grows", EVERYWHERE),
    "from a position on": ({"activations": at((POSITIONS >= 5) & REAL)}, "from-position", EVERYWHERE),
    "after the first tokens": ({"activations": at((POSITIONS > 0) & REAL)}, "first-tokens-agree", EVERYWHERE),
    "examples": ({"activations": only_rows(slice(2, 4))}, "only-some-examples", EVERYWHERE),
    "a slice's examples": ({"activations": only_rows(slice(2, 4))}, "rows-of-a-slice", {"activations": only_rows(slice(1, 3))}),
    "one vector": (
        {"activations": lambda arrays: arrays | {"layers.0.attention": arrays["layers.0.attention"] + noise(E)}},
        "same-everywhere", EVERYWHERE,
    ),
    "examples moved": (
        {"activations": lambda arrays: arrays | {"layers.0.attention": arrays["layers.0.attention"][[0, 1, 0, 1]]}},
        "rows-moved", EVERYWHERE,
    ),
    "positions moved": (
        {"activations": lambda arrays: arrays | {"layers.0.attention": np.roll(arrays["layers.0.attention"], 2, axis=1)}},
        "positions-moved", EVERYWHERE,
    ),
    "a factor at each token": (
        {"activations": lambda arrays: arrays | {
            "layers.0.attention": arrays["layers.0.attention"] * (1 + 1e-3 * np.arange(64).reshape(4, 16, 1))
        }},
        "factor-by-token", EVERYWHERE,
    ),
    "a slice lost": ({"activation_gradients": by_rows(1, 1, 0, 0)}, "slice-missing", {"activation_gradients": by_rows(1, 1, 2, 2)}),
    "a slice twice": ({"activation_gradients": by_rows(2, 2, 1, 1)}, "slice-doubled", {"activation_gradients": by_rows(1.1, 1.1, 0.8, 0.8)}),
    "an error that is gone further back": (
        {"activation_gradients": by_rows(1.1, 0.9, 1.1, 1.1)}, "agrees-further-back",
        {"activation_gradients": lambda arrays: {p: all_noise(a) for p, a in arrays.items()}},
    ),
    "one family": ({"gradients": in_tensors({n for n in SHAPES if "q_proj" in n}, all_noise)}, "one-family", GRADIENT_NOISE),
    "norms": ({"updates": in_tensors({NORM}, lambda u: u + 1e-3)}, "only-norms-and-biases", UPDATE_NOISE),
    "all but norms": ({"updates": in_tensors(set(SHAPES) - {NORM}, all_noise)}, "only-decaying", UPDATE_NOISE),
    "no update": ({"updates": in_tensors({Q1}, np.zeros_like)}, "zero", UPDATE_NOISE),
    "no gradient in a block": (
        {"gradients": in_tensors({Q1}, lambda g: np.where(np.arange(8)[:, None] < 4, 0, g))}, "zero-block", GRADIENT_NOISE,
    ),
    "a moment not updated": ({"moment2": in_tensors({Q1}, np.zeros_like)}, "unchanged", {"moment2": in_tensors({Q1}, all_noise)}),
    "a shard not updated": (
        {"moment2": in_tensors({Q1}, lambda m: np.where(np.arange(8)[:, None] < 4, 0, m))}, "unchanged-block",
        {"moment2": in_tensors({Q1}, all_noise)},
    ),
    "rounded": ({"gradients": in_tensors(SHAPES, rounded)}, "bf16-numbers", GRADIENT_NOISE),
    "a sum of rounded": ({"gradients": in_tensors(SHAPES, lambda g: rounded(g * 0.7) + rounded(g * 0.3))}, "sums-of-bf16", GRADIENT_NOISE),
    "a sum of rounded, and nothing else": (
        {"gradients": in_tensors(SHAPES, lambda g: rounded(g * 0.7) + rounded(g * 0.3))}, "sums-of-bf16",
        {"gradients": in_tensors(SHAPES, lambda g: rounded(g * 0.7) + rounded(np.flip(g) * 0.3))},
    ),
    "like a rounding": ({"gradients": in_tensors(SHAPES, all_noise)}, "like-rounding", {"gradients": in_tensors(SHAPES, lambda g: g * 1.01)}),
    "transposed": ({"gradients": in_tensors({Q1}, lambda g: g.T.copy())}, "transposed", {"gradients": in_tensors({Q1}, all_noise)}),
    "rows of a weight": ({"gradients": in_tensors({Q1}, lambda g: g[::-1].copy())}, "rows-moved", {"gradients": in_tensors({Q1}, all_noise)}),
    "order": ({"batch": lambda b: replace(b, input_ids=b.input_ids[::-1].copy())}, "same-examples", {"batch": lambda b: replace(b, input_ids=(b.input_ids + 1) % 32)}),
    "other examples": ({"batch": lambda b: replace(b, input_ids=(b.input_ids + 1) % 32)}, "whole-examples", {"batch": lambda b: replace(b, labels=b.labels + 1)}),
    "positions": ({"batch": lambda b: replace(b, positions=b.positions + 1)}, "only-positions", {"batch": lambda b: replace(b, positions=b.positions + 1, labels=b.labels + 1)}),
    "labels": ({"batch": lambda b: replace(b, labels=np.roll(b.labels, 1, axis=1))}, "only-labels", {"batch": lambda b: replace(b, labels=b.labels + 1, segments=b.segments + 1)}),
    "a count of positions": ({"tokens": lambda n: 64}, "count-of-positions", {"tokens": lambda n: n + 7}),
    "not a number": ({"gradients": in_tensors({Q1}, lambda g: g * np.nan)}, "not-finite", GRADIENT_NOISE),
    "a norm of more": ({"grad_norm": lambda n: n * 1.5}, "norm-larger", {"grad_norm": lambda n: n * 0.5}),
    "a norm of a part": ({"grad_norm": lambda n: n * 0.5}, "norm-of-part", {"grad_norm": lambda n: n * 1.5}),
}  # fmt: skip
COUNTS = {"accumulation": 2.0}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_planted_pattern_is_seen_and_only_where_it_is(name: str, tmp_path: Path):
    changes, kind, control = PATTERNS[name]
    assert kind in seen(diagnosis_of(tmp_path / "planted", counts=COUNTS, **changes))
    assert kind not in seen(diagnosis_of(tmp_path / "control", counts=COUNTS, **control))


def test_a_position_is_not_said_of_gradients(tmp_path: Path):
    """Where the prompt has no label it has no gradient, so every error of a gradient begins late in a document."""
    late = (POSITIONS >= 5) & REAL

    def of_points(arrays):
        return {p: a * late[:, -16:, None] if a.shape[1] == 16 else a for p, a in arrays.items()}

    def changed(arrays):
        return {
            p: all_noise(a) * late[:, :, None] if p == "layers.1.block" else a
            for p, a in of_points(arrays).items()
        }

    traces = (
        leave(tmp_path / "a", activation_gradients=of_points),
        leave(tmp_path / "b", activation_gradients=changed),
    )
    pair = Pair(*traces)
    kinds = seen(diagnose(compare(pair, ProofBounds(pair)), traces))
    assert not {"grows", "from-position", "first-tokens-agree"} & set(kinds)


def test_a_comparison_that_holds_has_no_diagnosis(tmp_path: Path):
    assert diagnosis_of(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [EVERYWHERE, GRADIENT_NOISE, {"loss_sum": lambda loss: loss * 1.0371}],
    ids=["points", "gradients", "loss"],
)
def test_what_fits_no_cause_says_so(changes: dict, tmp_path: Path):
    found = diagnosis_of(tmp_path, **changes)
    assert found
    strong = [each for each in found.causes if each.score > NAMED + 2]
    assert not strong, strong


def test_without_a_cause_the_excluded_ones_and_a_command_are_said(tmp_path: Path):
    found = diagnosis_of(tmp_path, loss_sum=lambda loss: loss * 1.0371)
    assert found
    assert not found.causes
    lines = found.lines()
    assert lines[0] == "diagnosis: no known cause fits well"
    assert "label-shift" in found.excluded
    assert lines[-1].startswith("  next: parity check RECIPE")


def test_a_count_of_the_recipe_is_named_and_chance_is_not(tmp_path: Path):
    changes = {"gradients": in_tensors(SHAPES, lambda g: g / 7)}
    named = seen(diagnosis_of(tmp_path / "x", counts={"accumulation": 7.0, "rank": 8.0}, **changes))
    assert "1 / accumulation" in named["count-factor"]
    assert "of " in named["count-factor"]
    assert "count-factor" not in seen(diagnosis_of(tmp_path / "y", counts={"rank": 8.0}, **changes))


def test_several_counts_that_fit_are_said_to_be_several(tmp_path: Path):
    changes = {"gradients": in_tensors(SHAPES, lambda g: g / 7)}
    named = seen(diagnosis_of(tmp_path, counts={"accumulation": 7.0, "width": 7.0}, **changes))[
        "count-factor"
    ]
    assert "one of " in named


@pytest.mark.parametrize(
    ("mistake", "cause"),
    [
        ({"clip": 1e9}, "clip-missing"),
        ({"lr_factor": 1.01}, "schedule"),
        ({"lr_factor": 1.01, "logs_true_lr": False}, "rate-applied"),
        (
            {"lr_factor": 1.9, "logs_true_lr": False},
            "momentum",
        ),  # 1 + beta1, as a look ahead is at the first step
        ({"betas": (0.9, 0.99)}, "betas"),
        ({"no_decay": True}, "decay-size"),
        ({"coupled_decay": True}, "decay-in-gradient"),
        ({"eps_inside": True}, "adam-epsilon"),
        ({"eps": 1e-4}, "adam-epsilon"),
        ({"no_bias_correction": True}, "bias-correction"),
        ({"frozen": True}, "update-lost"),
    ],
    ids=str,
)
def test_a_run_with_a_mistake_in_its_optimizer_is_diagnosed(mistake: dict, cause: str, tmp_path: Path):
    traces = [
        Trace(write(Sim().but(**changes), tmp_path / side)) for side, changes in (("a", {}), ("b", mistake))
    ]
    pair = Pair(*traces)
    found = diagnose(compare(pair, ProofBounds(pair)), (traces[0], traces[1]))
    assert found
    assert found.causes[0].cause.name == cause, [(each.cause.name, each.score) for each in found.causes]


LOSS_MISTAKES = {
    "loss-of-shift": lambda z, y: cross_entropy(z[:, :-2], y[:, 2:]),
    "loss-of-unshifted": lambda z, y: cross_entropy(z, y),
    "loss-of-every-position": lambda z, y: cross_entropy(z[:, :-1], np.maximum(y[:, 1:], 0)),
    "loss-of-bf16": lambda z, y: cross_entropy(rounded(z)[:, :-1], y[:, 1:]),
    "loss-off": lambda z, y: 1.0371 * cross_entropy(z[:, :-1], y[:, 1:]),
}


def cross_entropy(scores: np.ndarray, targets: np.ndarray) -> float:
    rows, wanted = scores[targets != -100], targets[targets != -100]
    return float(np.sum(np.log(np.exp(rows).sum(axis=-1)) - rows[np.arange(len(rows)), wanted]))


@pytest.mark.parametrize("kind", LOSS_MISTAKES)
def test_a_loss_is_made_again_from_its_logits(kind: str, tmp_path: Path):
    logits = np.random.default_rng(9).standard_normal((4, 16, VOCAB))
    labels = packed_and_padded().labels
    points = lambda arrays: arrays | {"logits": logits}  # noqa: E731
    right = cross_entropy(logits[:, :-1], labels[:, 1:])
    wrong = LOSS_MISTAKES[kind](logits, labels)
    traces = (
        leave(tmp_path / "a", activations=points, loss_sum=lambda _: right),
        leave(tmp_path / "b", activations=points, loss_sum=lambda _: wrong),
    )
    pair = Pair(*traces)
    kinds = set(seen(diagnose(compare(pair, ProofBounds(pair)), traces)))
    assert kinds & set(LOSS_MISTAKES) == {kind}


def logits_gradient(
    z: np.ndarray, targets: np.ndarray, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> np.ndarray:
    """Of a mean over 7 tokens; by the formula of the paper that smoothed labels, and log(Z)² for the z-loss."""
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    one = np.eye(VOCAB)[np.maximum(targets, 0)] * (1 - smoothing) + smoothing / VOCAB
    extra = 2 * z_loss * np.log(np.exp(z).sum(axis=-1, keepdims=True)) * p
    return np.where((targets != -100)[..., None], p - one + extra, 0.0) / 7


def labels_after(labels: np.ndarray, places: int) -> np.ndarray:
    return np.pad(labels[:, places:], ((0, 0), (0, places)), constant_values=-100)


def late_columns(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As if the second of two shards of the vocabulary began a column late: its first target is in no shard."""
    targets, half = labels_after(y, 1), VOCAB // 2
    right, one = logits_gradient(z, targets), np.eye(VOCAB + 1)[:, :VOCAB]
    late = np.where(targets == half, VOCAB, targets - (targets > half))
    counts = (targets != -100)[..., None]
    return right + np.where(counts, one[np.maximum(targets, 0)] - one[np.maximum(late, 0)], 0.0) / 7


# (the gradient, the fact that must be seen, words of it, the cause that must be named first)
GRADIENT_MISTAKES = {
    "shifted twice": (lambda z, y: logits_gradient(z, labels_after(y, 2)), "loss-of-shift", "", "label-shift"),
    "not shifted": (lambda z, y: logits_gradient(z, y), "loss-of-unshifted", "", "label-shift"),
    "every position": (
        lambda z, y: logits_gradient(z, np.where(np.arange(16) < 15, np.maximum(labels_after(y, 1), 0), -100)),
        "loss-of-every-position", "", "loss-mask",
    ),
    "smoothing": (
        lambda z, y: logits_gradient(z, labels_after(y, 1), smoothing=0.1), "loss-with-a-term", "smoothing of 0.1", "loss-form",
    ),
    "z-loss": (lambda z, y: logits_gradient(z, labels_after(y, 1), z_loss=1e-3), "loss-with-a-term", "z-loss of 0.001", "loss-form"),
    "late columns": (late_columns, "loss-of-late-columns", "first of 2 shards", "vocabulary-offset"),
    "another divisor": (lambda z, y: 1.5 * logits_gradient(z, labels_after(y, 1)), None, "", "loss-divisor"),
    "nothing known": (lambda z, y: logits_gradient(z, labels_after(y, 1)) + noise(z.shape), None, "", None),
}  # fmt: skip
OF_THE_LOSS = {kind for _, kind, _, _ in GRADIENT_MISTAKES.values() if kind}


@pytest.mark.parametrize("positions", [10**6, 9])
@pytest.mark.parametrize("name", GRADIENT_MISTAKES)
def test_a_gradient_of_the_logits_is_made_again(
    name: str, positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the loss is; it may hide a mistake in its rounding that its gradient shows. Of a large one some positions are enough."""
    monkeypatch.setattr(logits_gradient_facts, "ELEMENTS", positions * VOCAB)
    logits = np.random.default_rng(9).standard_normal((4, 16, VOCAB))
    labels = packed_and_padded().labels
    points = lambda arrays: arrays | {"logits": logits}  # noqa: E731
    right = logits_gradient(logits, labels_after(labels, 1))
    mistake, kind, words, cause = GRADIENT_MISTAKES[name]
    wrong = mistake(logits, labels)
    traces = (
        leave(tmp_path / "a", activations=points, activation_gradients=lambda g: g | {"logits": right}),
        leave(tmp_path / "b", activations=points, activation_gradients=lambda g: g | {"logits": wrong}),
    )
    pair = Pair(*traces)
    found = diagnose(compare(pair, ProofBounds(pair)), traces)
    assert found
    facts = seen(found)
    assert set(facts) & OF_THE_LOSS == ({kind} if kind else set())
    assert kind is None or (words in facts[kind] and facts[kind].startswith("right's"))
    assert cause is None or found.causes[0].cause.name == cause


@pytest.mark.parametrize(("factor", "is_doubled"), [(-2.0, False), (640.03, False), (2.0, True)])
def test_a_slice_counts_a_whole_number_of_times_or_not(factor: float, is_doubled: bool, tmp_path: Path):
    facts = seen(diagnosis_of(tmp_path, activation_gradients=by_rows(factor, 1, 1, 1)))
    assert "factor-by-slice" in facts
    assert ("slice-doubled" in facts) == is_doubled


BLOCK = "layers.1.block"


@pytest.mark.parametrize("policy", ["bf16", None])
@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        ((2, 1, 1, 1), "slice-doubled"),
        ((2, 2, 2, 2), "factor"),
        ((1, 1, 1, 1), None),
    ],
)
def test_in_bf16_a_factor_is_known_to_a_few_roundings(
    factors: tuple[float, ...], kind: str | None, policy: Policy | None, tmp_path: Path
):
    """Each element of the first example is off by up to a half of a hundredth; runs that do not say that they are bf16 have no such excuse."""
    off = 1 + 0.006 * np.sign(noise((4, 16, E))) * (np.arange(4) == 0)[:, None, None]
    times = np.array(factors, float)[:, None, None]
    leave(tmp_path / "a")
    leave(tmp_path / "b", activation_gradients=lambda g: g | {BLOCK: g[BLOCK] * times * off})
    for side in ("a", "b"):
        TraceHeader(policy=policy).write(tmp_path / side)
    traces = Trace(tmp_path / "a"), Trace(tmp_path / "b")
    pair = Pair(*traces)
    facts = seen(diagnose(compare(pair, ProofBounds(pair)), traces))
    looked_for = {"slice-doubled", "factor", "mean-of-slices"}
    is_known = kind == "factor" or policy == "bf16"
    assert set(facts) & looked_for == ({kind} if kind and is_known else set())


def attention_inputs(prefix: bool = False) -> list[Inputs]:
    random = np.random.default_rng(3)
    front = (random.standard_normal((2, KV, D)), random.standard_normal((2, KV, D))) if prefix else None
    return [
        Inputs(
            random.standard_normal((16, HEADS, D)),
            *(random.standard_normal((16, KV, D)) for _ in range(2)),
            front,
            segments,
        )
        for segments in SEGMENTS
    ]


MIXES = {
    "mix-of-later-keys": Form(after=1),
    "mix-of-padding": Form(padding=True),
    "mix-of-documents": Form(documents=False),
    "mix-without-prefix": Form(prefix=False),
    "mix-of-tiled-heads": Form(tiled=True),
    "mix-of-window": Form(window=4),
    "mix-of-scale": Form(scale=1.7),
    "mix-of-bf16": Form(rounded=True),
    "mix-of-other-heads": Form(shifted=1),
    "mix-without-offset": Form(offset=False),
}
WITH_PREFIX = ("mix-without-prefix", "mix-without-offset")


@pytest.mark.parametrize("kind", [*MIXES, "none"])
def test_attention_is_made_again_from_its_inputs(kind: str, tmp_path: Path):
    segments = np.where(SEGMENTS == 0, 0, SEGMENTS)[:, ::-1] if kind == "mix-of-padding" else SEGMENTS
    inputs = [
        replace(each, segments=s)
        for each, s in zip(attention_inputs(kind in WITH_PREFIX), segments, strict=True)
    ]
    right = np.stack([_apply(each, Form()) for each in inputs])
    wrong = (
        np.stack([_apply(each, MIXES[kind]) for each in inputs])
        if kind in MIXES
        else right + noise(right.shape)
    )

    def points(mixed):
        names = {"rotated_query": "query", "rotated_key": "key", "value": "value"}
        taken = {point: np.stack([getattr(each, name) for each in inputs]) for point, name in names.items()}
        if inputs[0].prefix:
            taken |= {
                f"prefix_{n}": np.stack([each.prefix[i] for each in inputs])
                for i, n in enumerate(("key", "value"))
            }
        return lambda _: {f"layers.0.{point}": array for point, array in (taken | {"mixed": mixed}).items()}

    turned = lambda b: replace(b, segments=segments.copy())  # noqa: E731
    traces = (
        leave(tmp_path / "a", activations=points(right), batch=turned, activation_gradients=lambda _: {}),
        leave(tmp_path / "b", activations=points(wrong), batch=turned, activation_gradients=lambda _: {}),
    )
    pair = Pair(*traces)
    kinds = set(seen(diagnose(compare(pair, ProofBounds(pair)), traces)))
    assert kinds & set(MIXES) == {kind} & set(MIXES)


STREAMS = {
    "stream-factor": lambda x, normed, a, m: x + 0.22 * (a + m),
    "stream-of-normed": lambda x, normed, a, m: normed + a + m,
    "none": lambda x, normed, a, m: all_noise(x + a + m),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_made_again_from_what_is_added(kind: str, tmp_path: Path):
    x, normed, attention, mlp = np.random.default_rng(7).standard_normal((4, 4, 16, E))
    added = {
        "embedding": x,
        "layers.0.input_norm": normed,
        "layers.0.attention": attention,
        "layers.0.mlp": mlp,
    }
    right, wrong = x + attention + mlp, STREAMS[kind](x, normed, attention, mlp)
    traces = (
        leave(
            tmp_path / "a",
            activations=lambda _: added | {"layers.0.block": right},
            activation_gradients=lambda _: {},
        ),
        leave(
            tmp_path / "b",
            activations=lambda _: added | {"layers.0.block": wrong},
            activation_gradients=lambda _: {},
        ),
    )
    pair = Pair(*traces)
    found = diagnose(compare(pair, ProofBounds(pair)), traces)
    assert set(seen(found)) & set(STREAMS) == {kind} & {"stream-factor", "stream-of-normed"}
    assert found
    assert ("residual" in [cause.name for cause in found.alike]) == (kind != "none")


def altered(trace: Path, file: str, key: str, change) -> Trace:
    arrays = load_file(trace / file)
    save_file(arrays | {key: np.ascontiguousarray(change(arrays[key]))}, trace / file)
    return Trace(trace)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_gradient_of_the_step_before_is_seen(is_kept: bool, tmp_path: Path):
    left = write(Sim(steps=2), tmp_path / "a")
    kept = Trace(left).read(1, f"gradient/{Q1}")
    more = 0.4 * kept if is_kept else 0.4 * noise(kept.shape)
    right = altered(
        write(Sim(steps=2), tmp_path / "b"), "step-000002.safetensors", f"gradient/{Q1}", lambda g: g + more
    )
    pair = Pair(Trace(left), right)
    found = diagnose(compare(pair, ProofBounds(pair)), (Trace(left), right))
    assert ("adds-earlier-gradient" in seen(found)) == is_kept
    assert found
    assert ("stale-gradient" in [cause.name for cause in found.alike]) == is_kept


@pytest.mark.parametrize("is_first", [True, False])
def test_a_weight_of_another_layer_is_seen(is_first: bool, tmp_path: Path):
    left = write(Sim(), tmp_path / "a")
    other = Trace(left).read_initial(f"weight/{Q1.replace('.1.', '.0.')}")
    right = altered(
        write(Sim(), tmp_path / "b"),
        "initial.safetensors",
        f"weight/{Q1}",
        lambda w: other if is_first else w[::-1],
    )
    pair = Pair(Trace(left), right)
    found = diagnose(compare(pair, ProofBounds(pair)), (Trace(left), right))
    assert ("of-another-layer" in seen(found)) == is_first
    assert found
    assert ("layer-order" in [cause.name for cause in found.alike]) == is_first


@pytest.mark.parametrize("is_swapped", [True, False])
def test_a_swapped_prefix_is_seen(is_swapped: bool, tmp_path: Path):
    keys, values, others = np.random.default_rng(4).standard_normal((3, 4, 2, KV, D))
    left = {"layers.0.prefix_key": keys, "layers.0.prefix_value": values}
    wrong = {"layers.0.prefix_key": values, "layers.0.prefix_value": keys}
    right = wrong if is_swapped else wrong | {"layers.0.prefix_key": others}
    traces = (
        leave(tmp_path / "a", activations=lambda _: left, activation_gradients=lambda _: {}),
        leave(tmp_path / "b", activations=lambda _: right, activation_gradients=lambda _: {}),
    )
    pair = Pair(*traces)
    assert ("swapped" in seen(diagnose(compare(pair, ProofBounds(pair)), traces))) == is_swapped


def turned_heads(heads: np.ndarray, *, times: float = 1.0) -> np.ndarray:
    """Heads [examples, tokens, heads, 4] rotated in two pairs of halves by their position and a tenth of it."""
    turns = np.exp(1j * times * POSITIONS[:, :, None, None] * np.array([1.0, 0.1]))
    both = (heads[..., :2] + 1j * heads[..., 2:]) * turns
    return np.concatenate([both.real, both.imag], axis=-1)


ROTATIONS = {
    "rotated-layers": (0.0, {"not-rotated"}),
    "rotation": (1.5, {"other-frequencies"}),
    "rotation-precision": (1 + 2.0**-11, {"other-frequencies", "near-frequencies"}),
}


@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize("cause", ROTATIONS)
def test_how_two_rotations_differ(cause: str, is_partial: bool, tmp_path: Path):
    """Of two halves of a head, and of neighbours in its first part, as a GLM's."""
    times, kinds = ROTATIONS[cause]
    queries = np.random.default_rng(6).standard_normal((4, 16, HEADS, 6 if is_partial else 4))

    def points(times: float):
        rotated = queries.copy()
        order = [0, 2, 1, 3] if is_partial else [0, 1, 2, 3]
        rotated[..., order] = turned_heads(queries[..., order], times=times)
        mixed = queries + times  # what attends by them differs, too
        return lambda _: {
            "layers.0.query": queries,
            "layers.0.rotated_query": rotated,
            "layers.0.mixed": mixed,
        }

    traces = (
        leave(tmp_path / "a", activations=points(1.0), activation_gradients=lambda _: {}),
        leave(tmp_path / "b", activations=points(times), activation_gradients=lambda _: {}),
    )
    pair = Pair(*traces)
    found = diagnose(compare(pair, ProofBounds(pair)), traces)
    told = {"not-rotated", "other-frequencies", "near-frequencies", "angle-offset", "other-pairs"}
    assert set(seen(found)) & told == kinds
    assert found
    assert found.alike[0].name == cause


def sections() -> dict[str, str]:
    """The text under each heading of the contract, its lines joined."""
    parts = re.split(r"^#{1,2} ", (ROOT / "docs/numerics.md").read_text(), flags=re.M)[1:]
    return {
        head.strip(): " ".join(body.split()) for head, _, body in (part.partition("\n") for part in parts)
    }


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_asks_for_facts_that_there_are_and_points_at_a_line_of_the_contract(name: str):
    cause = CAUSES[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert cause.kinds() <= set(KINDS)
    assert set(cause.alike) <= set(CAUSES) - {name}
    assert cause.contract.words in sections()[cause.contract.section]
    assert not cause.sentence.endswith(".")
    # Whatever a cause needs can make it named.
    best = len(cause.needs) + sum(points for kind, points in cause.fits.items() if kind not in cause.excluded)
    assert best >= NAMED


@pytest.mark.parametrize("name", CAUSES)
def test_the_next_command_can_be_run(name: str):
    command = CAUSES[name].next.partition("  #")[0]
    assert re.match(r"parity check RECIPE( |$)|trainspec (show|data) RECIPE$", command)
    keys = re.findall(r"([a-z]+)\.([a-z_]+)=", command)
    for section, field in keys:
        assert section in Recipe.model_fields
        known = Recipe.model_fields[section].annotation
        aliases = (
            {f.alias or n for n, f in known.model_fields.items()}
            if hasattr(known, "model_fields")
            else {field}
        )
        assert field in aliases, f"{section}.{field}"
    assert keys or "--" in command or command.startswith("trainspec")


def test_the_page_has_every_cause():
    page = (ROOT / "docs/diagnosis.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", page, flags=re.M))
    assert rows == {name: cause.sentence.replace("|", "\\|") for name, cause in CAUSES.items()}


def test_every_kind_of_method_has_a_fact():
    assert set(settings_facts.METHODS) == set(METHODS)


def test_a_kind_of_fact_that_is_not_listed_is_refused():
    with pytest.raises(KeyError, match="no kind of fact"):
        Fact("not-there", "words")
