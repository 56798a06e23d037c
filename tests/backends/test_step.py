"""One update in float64: its gradient, its independence of the split, the clip, AdamW, and what stays put."""

import json
from dataclasses import fields, replace

import numpy as np
import numpy_llama
import pytest
from backend import (
    NAME,
    PROGRAM,
    copied_bytes,
    feed,
    moments_of,
    restore,
    shards_of,
    spec_of,
    train_step,
    weights_of,
)
from many import run_many
from small import VARIANTS
from test_model import FP64, FULL, LORA, PACKED, prepare

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.folders import latest
from trainspec.data import IGNORED, Batch
from trainspec.errors import NonFiniteLossError
from trainspec.methods import trainable_table

# With dropout, which a recomputation must repeat.
LORA_FIRST = pytest.mark.parametrize(
    "method", [pytest.param(FULL, id="full", marks=pytest.mark.full), pytest.param(LORA, id="lora")]
)
BF16 = {"policy": "bf16", "reduce": "fp32"}
LEFT = {"padding_side": "left"}
SPLIT_ROUNDING = 1e-12  # another order of a few hundred additions, each exact to 1e-16


def one_update(recipe):
    state, batch = prepare(recipe)
    state, metrics = train_step(state, batch, lr=1e-2, keep="gradients")
    return state, metrics


def relative(mine, theirs):
    """The worst tensor's; NaN where one is (Python's max would pass over it)."""
    return np.max([np.abs(mine[n] - theirs[n]).max() / max(np.abs(theirs[n]).max(), 1e-300) for n in theirs])


# Of the fast tests: a head that is the embedding and one that is not, biases, and norms of heads.
SLOPES = ("tied", "bias", "qwen3")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in SLOPES else pytest.mark.full) for v in VARIANTS]
)
def test_gradient_is_the_slope_of_the_numpy_loss(make_recipe, variant):
    """Along a random unit direction: central differences of the oracle are good to h² and 1e-15 / h."""
    recipe = make_recipe(variant, method=FULL, precision=FP64, data=PACKED)
    state, batch = prepare(recipe)
    weights, rng, h = weights_of(state), np.random.default_rng(0), 1e-4
    direction = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))
    direction = {name: d / length for name, d in direction.items()}

    def loss(at):
        moved = {name: w + at * direction[name] for name, w in weights.items()}
        return numpy_llama.loss_sum(moved, spec_of(recipe), batch) / batch.target_tokens

    _, metrics = train_step(state, batch, lr=0.0, keep="gradients")
    slope = sum((metrics.gradients[name] * d).sum() for name, d in direction.items())
    assert metrics.loss_sum / metrics.tokens == pytest.approx(loss(0.0), rel=1e-13)
    assert slope == pytest.approx((loss(h) - loss(-h)) / (2 * h), abs=1e-9)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        pytest.param(LORA, PACKED, id="lora-packed"),
        *(
            pytest.param(method, data, marks=pytest.mark.full)
            for method, data in ((LORA, LEFT), (FULL, LEFT), (FULL, PACKED))
        ),
    ],
)
def test_the_split_into_microbatches_does_not_matter(make_recipe, method, data):
    """Of gradients and moments, with dropout; test_invariance.py has more ways to split."""

    def run(accumulation):
        batch = {"global_examples": 4, "accumulation": accumulation}
        recipe = make_recipe(method=method, precision=FP64, data=data, batch=batch)
        return one_update(recipe)

    (whole, metrics), (split, split_metrics) = run(1), run(4)
    assert relative(split_metrics.gradients, metrics.gradients) < SPLIT_ROUNDING
    assert relative(moments_of(split)[1], moments_of(whole)[1]) < SPLIT_ROUNDING
    assert split_metrics.loss_sum == pytest.approx(metrics.loss_sum, rel=1e-14)
    assert split_metrics.tokens == metrics.tokens


def test_a_fed_batch_is_the_same_batch(make_recipe):
    """Three updates that change nothing: of a batch, of the same one fed ahead, and of one with fewer targets."""
    state, batch = prepare(
        make_recipe(method=FULL, precision=FP64, data=PACKED, batch={"global_examples": 4, "accumulation": 2})
    )
    fed, labels = feed(state, batch), batch.labels.copy()
    assert all(np.array_equal(getattr(fed, f.name), getattr(batch, f.name)) for f in fields(Batch))
    labels[:, ::2] = IGNORED
    losses = []
    for each in (batch, fed, feed(state, replace(batch, labels=labels))):
        state, metrics = train_step(state, each, lr=0.0)
        losses.append(metrics.loss_sum)
    assert losses[0] == losses[1] > losses[2]


@LORA_FIRST
def test_recomputation_does_not_matter(make_recipe, method):
    (plain, metrics), (remat, remat_metrics) = (
        one_update(make_recipe(method=method, precision=FP64, plan={"remat": remat}))
        for remat in ("none", "full")
    )
    assert relative(remat_metrics.gradients, metrics.gradients) < SPLIT_ROUNDING
    assert relative(moments_of(remat)[1], moments_of(plain)[1]) < SPLIT_ROUNDING


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
def test_update_is_adamw_written_out(make_recipe, clip_norm):
    """Three updates against p -= lr * (m̂ / (sqrt(v̂) + eps) + decay * p) in numpy."""
    recipe = make_recipe(
        "bias", method=FULL, precision=FP64,
        optimizer={"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3, "clip_norm": clip_norm},
    )  # fmt: skip
    state, batch = prepare(recipe)
    decay = {p.name: 0.3 * p.decay for p in trainable_table(spec_of(recipe), recipe.method)}
    assert {0.0, 0.3} == set(decay.values())
    m = v = dict.fromkeys(decay, 0.0)
    for step, lr in enumerate((0.0, 1e-2, 5e-3), 1):
        before = weights_of(state)
        state, metrics = train_step(state, batch, lr=lr, keep="gradients")
        norm = np.sqrt(sum((g**2).sum() for g in metrics.gradients.values()))
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-13)
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        for name, gradient in metrics.gradients.items():
            m = m | {name: 0.8 * m[name] + 0.2 * factor * gradient}
            v = v | {name: 0.95 * v[name] + 0.05 * (factor * gradient) ** 2}
            root = np.sqrt(v[name] / (1 - 0.95**step)) + 1e-6
            update = -lr * (m[name] / (1 - 0.8**step) / root + decay[name] * before[name])
            mine = weights_of(state)[name] - before[name]
            # A difference of weights is exact to one rounding of the weight.
            np.testing.assert_allclose(mine, update, rtol=1e-10, atol=4e-16 * np.abs(before[name]).max())


def test_frozen_weights_stay(make_recipe):
    recipe = make_recipe(method=LORA, precision=FP64)
    state, batch = prepare(recipe)
    trained = {p.name for p in trainable_table(spec_of(recipe), recipe.method)}
    before = weights_of(state, frozen=True)
    state, metrics = train_step(state, batch, lr=1e-2, keep="gradients")
    after = weights_of(state, frozen=True)
    assert set(metrics.gradients) == set(moments_of(state)[0]) == trained
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert changed <= trained


@pytest.mark.parametrize("precision", [FP64, BF16], ids=["fp64", "bf16"])
def test_the_sizes_of_what_a_save_copies_are_known_before_it(make_recipe, precision):
    """Before the first update as well, when the memory is made."""
    state, batch = prepare(make_recipe(method=LORA, precision=precision))
    known, sizes = copied_bytes(state), []

    def copy(array):
        sizes.append(array.nbytes)
        return array.copy()

    saved = sum(shard.array.nbytes for shard in shards_of(state, copy))
    assert known == sizes
    assert sum(known) == saved
    state, _ = train_step(state, batch, lr=1e-2)
    assert copied_bytes(state) == known


def test_dropout_moves_with_the_step_and_is_off_in_evaluation(make_recipe):
    def gradients(dropout, *steps):
        """Those of updates from the same start that are said to be the `steps`th."""
        state, batch = prepare(make_recipe(method=LORA | {"dropout": dropout}, precision=FP64))
        start = weights_of(state)
        nothing = {name: np.zeros_like(w) for name, w in start.items()}
        found = []
        for step in steps:
            state = restore(state, Checkpoint(step, start, nothing, nothing))
            state, metrics = train_step(state, batch, lr=0.0, keep="gradients")
            found.append(metrics.gradients)
        return found

    first, again, second = gradients(0.2, 0, 0, 1)
    plain, later = gradients(0.0, 0, 1)
    assert relative(first, again) == 0
    assert relative(second, first) > 1e-2
    assert relative(first, plain) > 1e-2
    assert relative(later, plain) == 0


@pytest.mark.parametrize(
    ("precision", "keep"),
    [
        pytest.param(BF16, "nothing", id="bf16-nothing"),
        pytest.param(FP64, "gradients", id="fp64-gradients"),
        pytest.param(FP64, "nothing", id="fp64-nothing", marks=pytest.mark.full),
        pytest.param(BF16, "gradients", id="bf16-gradients", marks=pytest.mark.full),
    ],
)
def test_a_loss_that_is_no_number_stops_before_the_update(make_recipe, keep, precision):
    """Weights, masters, moments and step are as they were, bit by bit."""
    recipe = make_recipe(method=FULL, precision=precision)
    state, batch = prepare(recipe)
    state, _ = train_step(state, batch, lr=1e-3)  # moments that are not zero
    weights, moments = weights_of(state), moments_of(state)
    sound, broken = dict(weights), {name: weight.copy() for name, weight in weights.items()}
    broken["model.norm.weight"][0] = np.nan
    state = restore(state, Checkpoint(1, broken, *moments))
    with pytest.raises(NonFiniteLossError, match="step 2") as raised:
        train_step(state, batch, lr=1e-2, keep=keep)
    metrics = raised.value.metrics
    assert np.isnan(metrics.loss_sum)
    assert (metrics.gradients is not None) == (keep == "gradients")
    if keep == "gradients":
        assert set(metrics.gradients) == set(weights)
        assert np.isnan(metrics.gradients["model.norm.weight"].astype(np.float64)).any()
    assert state.step == 1
    assert same(weights_of(state), broken)
    assert all(map(same, moments_of(state), moments))
    # Control: the same step with sound weights changes all of it.
    state = restore(prepare(recipe)[0], Checkpoint(1, sound, *moments))
    state, _ = train_step(state, batch, lr=1e-2, keep=keep)
    assert state.step == 2
    assert not same(weights_of(state), sound)
    assert not any(map(same, moments_of(state), moments))


def same(left, right):
    """Bit by bit, NaN included."""
    assert left.keys() == right.keys()
    return all(np.array_equal(array, right[name], equal_nan=True) for name, array in left.items())


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "precision"),
    [(FULL, FP64), (LORA, {"policy": "fp32"}), (FULL, BF16)],
    ids=["full-fp64", "lora-fp32", "full-bf16"],
)
def test_what_is_kept_of_a_step_changes_no_bit_of_it(make_recipe, method, precision, tmp_path, monkeypatch):
    """Where nothing is kept JAX makes gradients and update in one program, else in two."""
    # As users compile it: other ways of generating fused loops contract sums and products differently in each program.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    recipe = make_recipe(
        method=method, precision=precision,
        batch={"global_examples": 4, "accumulation": 2}, optimizer={"clip_norm": 0.05, "lr": 1e-2},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    runs = {
        "nothing": [],
        "gradients": ["--trace", str(tmp_path / "gradients-trace")],
        "activations": ["--trace", str(tmp_path / "activations-trace"), "--activations", "all"],
        "another rate": ["--set", "optimizer.lr=1.0001e-2"],
    }
    words = [
        ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / name), *more]
        for name, more in runs.items()
    ]
    for result in run_many(PROGRAM, words, tmp_path / "scratch"):
        assert result["code"] == 0, result

    def ended(name: str) -> tuple[list[dict[str, float]], dict[str, bytes]]:
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        figures = [{key: row[key] for key in ("loss", "grad_norm")} for row in rows]
        return figures, {f.name: f.read_bytes() for f in latest(tmp_path / name).glob("*.safetensors")}

    figures, files = ended("nothing")
    assert len(files) == 3
    for name in ("gradients", "activations"):
        kept_figures, kept_files = ended(name)
        if name == "activations" and precision != FP64 and (NAME == "torch" or precision == BF16):
            # On JAX what is recorded is rounded to bfloat16; a compiler may keep what nobody reads in wider registers. On torch
            # attention of a recorded step is in other pieces, as padding then sees what the definition says.
            rel = 1e-2 if precision == BF16 else 1e-6
            for kept, plain in zip(kept_figures, figures, strict=True):
                assert kept == pytest.approx(plain, rel=rel)
            continue
        assert kept_figures == figures
        assert kept_files == files
    assert ended("another rate")[1]["weights.safetensors"] != files["weights.safetensors"]  # control
