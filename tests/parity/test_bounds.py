"""The measured fp32 bound: clean runs keep a stated distance from it, thirty times their rounding exceeds it."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
from asked import asked_for
from safetensors.numpy import save_file
from synthetic import Q1, Sim, write

from parity.comparison.adam import AdamRule
from parity.comparison.compare import Comparison, Finding, _measure, _unproven, _worst, compare
from parity.comparison.estimated_bounds import gaussian_max_quantile, rms_upper_factor
from parity.comparison.measured_bounds import MeasuredBounds, Measurement, Summation, rms_lower_factor
from parity.comparison.pair import Pair
from parity.comparison.phases import Location
from parity.comparison.tolerance import DETERMINED, Bound, CheckedPair, ProofBounds, as_a_whole
from parity.judging.many import CheckRequest, RunPair, make_runs
from parity.judging.measure import ReplaySettings, measured_bounds, rule_of
from parity.report.verdict import Verdict, explained
from parity.runs.fixture import METHODS, TinySetup, write_tiny
from parity.runs.replay import mean_squares
from parity.runs.roundings import folded
from parity.runs.sides import Side, SideTraining
from trainspec.recipe import AdamW, load_recipe
from trainspec.runs.run import resolve
from trainspec.step import RMS_ROUNDING, Metrics
from trainspec.trace import StepTrace, Trace, TraceWriter

Low = Literal["fp32", "bf16"]
PACKED = {"packing": True, "sequence_tokens": 64}
STEPS = 2


def run_both(home: Path, tiny: TinySetup, variant: str, *, precision: Low = "fp32", **sections) -> Path:
    """Left and right traces under `home` of the recipe `home`/r.yaml. In bf16, gradients are summed in bfloat16."""
    home.mkdir()
    recipe = home / "r.yaml"
    types = {"policy": precision, "reduce": precision}
    recipe.write_text(tiny.recipe(variant, precision=types, **sections).to_yaml())
    for name, side in (("left", Side("jax")), ("right", Side("torch"))):
        SideTraining(side, name, recipe, (), precision, home).run(STEPS)
    return home


def bounds_of(home: Path, precision: Low = "fp32") -> tuple[Pair, MeasuredBounds]:
    pair = Pair(Trace(home / "left/trace"), Trace(home / "right/trace"))
    bounds = measured_bounds(pair, ReplaySettings(home / "r.yaml", (), precision, home))
    assert isinstance(bounds, MeasuredBounds)
    return pair, bounds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySetup:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def lora(tiny: TinySetup, tmp_path_factory) -> Path:
    method = tiny.method("lora")
    return run_both(tmp_path_factory.mktemp("runs") / "lora", tiny, "plain", method=method, data=PACKED)


@pytest.fixture(scope="module")
def measured(lora: Path) -> MeasuredBounds:
    return bounds_of(lora)[1]


@pytest.fixture(scope="module")
def coarse(tiny: TinySetup, tmp_path_factory) -> Path:
    """The same in bf16."""
    method = tiny.method("lora")
    home = tmp_path_factory.mktemp("runs") / "coarse"
    return run_both(home, tiny, "plain", precision="bf16", method=method, data=PACKED)


@pytest.fixture(scope="module")
def measured_coarse(coarse: Path) -> MeasuredBounds:
    return bounds_of(coarse, "bf16")[1]


def keeps_its_distance(pair: Pair, bounds: MeasuredBounds, *, noise: float = 0.001) -> None:
    """Rounding uses neither so much of a bound that luck decides, nor so little that the bound means nothing."""
    comparison = compare(pair, bounds)
    assert comparison.holds, comparison.first_divergence
    assert 0.01 < comparison.worst["gradient"].used < 0.4
    assert 0.003 < comparison.worst["loss"].used < 0.4
    for phase in (
        "grad_norm",
        "clip",
        "moment1",
        "moment2",
        "update",
    ):  # counted at its worst, not statistically
        assert 0.003 < comparison.worst[phase].used < 0.95, comparison.worst[phase]
    assert comparison.undetermined < noise


def test_clean_lora_keeps_its_distance(lora: Path, measured: MeasuredBounds):
    keeps_its_distance(Pair(Trace(lora / "left/trace"), Trace(lora / "right/trace")), measured)


@pytest.mark.full
def test_clean_lora_in_bf16_keeps_its_distance_and_every_gradient_is_proven(
    coarse: Path, measured_coarse: MeasuredBounds
):
    """Many single elements may be noise there; each tensor as a whole is held to less than half its norm."""
    pair = Pair(Trace(coarse / "left/trace"), Trace(coarse / "right/trace"))
    keeps_its_distance(pair, measured_coarse, noise=0.6)
    gradients = [f for f in compare(pair, measured_coarse).findings if f.location.phase == "gradient"]
    assert all(gradient.proven for gradient in gradients)
    assert any(gradient.undetermined > DETERMINED / 2 * gradient.elements for gradient in gradients)


FULL: list[tuple[str, Low]] = [
    ("plain", "bf16"), ("tied", "fp32"), ("tied", "bf16"), ("bias", "fp32"), ("llama3-rope", "fp32"),
]  # fmt: skip
# The other methods take turns between the precisions; test_no_false_alarm.py has all of them in fp32.
_NAMES = [name for name in METHODS if name not in ("full", "lora")]
OTHERS: list[tuple[str, Low]] = [*zip(_NAMES, itertools.cycle(("fp32", "bf16")), strict=False)]
Clean = Callable[[str, str, Low], tuple[Pair, MeasuredBounds]]


@pytest.fixture(scope="module")
def clean(tiny: TinySetup, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Clean:
    """The traces and bounds of a method on a variant; those of a precision are made in one process of each program."""
    made: dict[tuple[str, str, Low], RunPair] = {}

    def make(precision: Low) -> None:
        home = tmp_path_factory.mktemp(precision)
        asked = [("full", *case) for case in asked_for(request, "variant", "precision")]
        asked += [(method, "plain", p) for method, p in asked_for(request, "method", "precision")]
        keys = [key for key in asked if key[2] == precision]
        groups = []
        for method, variant, _ in keys:
            padded = method in ("prompt", "prefix") or (method == "full" and variant != "tied")
            recipe = tiny.recipe(
                variant,
                method=tiny.method(method),
                data={"padding_side": "left"} if padded else PACKED,
                precision={"policy": precision, "reduce": precision},
            )
            file = home / f"{method}-{variant}.yaml"
            file.write_text(recipe.to_yaml())
            groups.append([CheckRequest(file, (), home / file.stem)])
        sides = Side("jax"), Side("torch")
        runs = make_runs(groups, sides=sides, precision=precision, steps=STEPS, home=home / "launches")
        made.update(zip(keys, runs, strict=True))

    def found(method: str, variant: str, precision: Low) -> tuple[Pair, MeasuredBounds]:
        if (method, variant, precision) not in made:
            make(precision)
        runs = made[method, variant, precision]
        left, right = (side.trace for side in runs.results)
        assert left
        assert right
        pair = Pair(left, right)
        bounds = runs.bounds(pair)
        assert isinstance(bounds, MeasuredBounds)
        return pair, bounds

    return found


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize(("variant", "precision"), FULL)
def test_clean_full_training_keeps_its_distance(clean: Clean, variant: str, precision: Low):
    # In bf16 two thirds of a tied table's single elements are noise; each tensor as a whole is proven.
    keeps_its_distance(*clean("full", variant, precision), noise=0.001 if precision == "fp32" else 0.7)


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize(("method", "precision"), OTHERS)
def test_every_other_method_keeps_its_distance(clean: Clean, method: str, precision: Low):
    pair, bounds = clean(method, "plain", precision)
    if (method, precision) == ("ptuning-mlp", "bf16"):
        # In some draws a ReLU flips: the bound before it is as large as the gradient, and the verdict says so.
        comparison = compare(pair, bounds)
        failing = [finding for finding in comparison.findings if not finding.holds]
        assert 0.003 < comparison.worst["loss"].used < 0.4
        if failing:
            assert all(str(finding.reason).startswith("nothing is proven") for finding in failing)
            phases = {finding.location.phase for finding in failing}
            assert phases <= {"gradient", "moment1", "moment2", "update"}
            return
    keeps_its_distance(pair, bounds, noise=0.001 if precision == "fp32" else 0.8)


def used(checked: CheckedPair) -> float:
    return float((np.abs(checked.first - checked.second) / checked.bound.own).max())


@pytest.mark.parametrize("phase", ["gradient", "moment1", "moment2", "update"])
@pytest.mark.parametrize("run", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_thirty_times_the_rounding_fails(phase: str, run: str, request: pytest.FixtureRequest):
    names = {"fp32": ("lora", "measured"), "bf16": ("coarse", "measured_coarse")}[run]
    home, measured = (request.getfixturevalue(name) for name in names)
    pair = Pair(Trace(home / "left/trace"), Trace(home / "right/trace"))
    worst = {"as it is": 0.0, "times 30": 0.0}
    for name in sorted(pair.names(2, phase)):
        left, right = (side.astype(np.float64) for side in pair.read(2, phase, name) if side is not None)
        for checked in measured.checked_pairs(Location(2, phase, name), left, right):
            more = CheckedPair(
                30 * (checked.first - checked.second) + checked.second, checked.second, checked.bound
            )
            worst["as it is"] = max(worst["as it is"], used(checked))
            worst["times 30"] = max(worst["times 30"], used(more))
    assert worst["as it is"] < 1 < worst["times 30"]


def test_runs_that_start_elsewhere_are_not_replayed(lora: Path, tmp_path: Path):
    pair = Pair(Trace(lora / "left/trace"), Trace(lora / "right/trace"))
    overrides = ("method.targets=[q_proj]", "method.adapter=null")
    other = measured_bounds(pair, ReplaySettings(lora / "r.yaml", overrides, "fp32", tmp_path))
    assert not isinstance(other, MeasuredBounds)
    verdict = Verdict("fp32", "jax", "torch", compare(pair, other))
    assert "estimated, not measured" in " ".join(verdict.notes)
    assert any("estimated, not measured" in line for line in verdict.lines(colour=False))


def test_a_reference_that_ends_before_the_runs_is_a_failure(
    lora: Path, measured: MeasuredBounds, tmp_path: Path
):
    """Float64 gave no finite loss from a weight that the run could use: no estimate replaces it."""
    left, right = measured.measurement.references
    short = shutil.copytree(right.directory, tmp_path / "short")
    lines = (short / "trace.jsonl").read_text().splitlines(keepends=True)
    (short / "trace.jsonl").write_text(lines[0])
    pair = Pair(Trace(lora / "left/trace"), Trace(lora / "right/trace"))
    cut = replace(measured.measurement, references=(left, Trace(short)))
    bounds = MeasuredBounds(
        pair,
        "fp32",
        measurement=cut,
        rule=rule_of(resolve(load_recipe(lora / "r.yaml", ()))),
        summation=Summation(),
    )
    first = compare(pair, bounds).first_divergence
    assert first is not None
    assert first.location.step == 2
    assert first.reason == "nothing is proven: fp64 from right is not finite"


@pytest.mark.parametrize(
    ("asked", "summands", "said"),
    [("fp32", (2, 2), True), ("bf16", (2, 2), False), ("fp32", (2, 1), False), ("fp32", (1, 2), True)],
)
def test_a_sum_in_bfloat16_on_one_side_only_is_found(asked, summands, said, measured: MeasuredBounds):
    """Within the bound of bf16, and still a failure; a single gradient that is no sum may be bfloat16."""
    location = Location(1, "gradient", "w")
    bounds = copy.copy(measured)
    bounds._summation = Summation(asked, summands)
    wide = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    narrow = wide.astype(ml_dtypes.bfloat16).astype(np.float32)
    reason = bounds.incomparable(location, wide, narrow)
    assert (reason is not None) == said
    if reason:
        assert reason.startswith("summed in bfloat16: every element in right")
    assert bounds.incomparable(location, narrow, narrow) is None
    assert bounds.incomparable(location, wide, np.zeros_like(wide)) is None
    assert bounds.incomparable(location, wide[:5], narrow[:5]) is None  # 60 numbers may be so by chance
    assert bounds.incomparable(Location(1, "moment1", "w"), wide, narrow) is None


def test_a_tensor_is_held_as_a_whole_where_its_elements_are_not():
    """Half of every element's bound, everywhere at once: no element shows it, the tensor's distance does."""
    location, wanted = Location(1, "gradient", "w"), np.ones(400)
    for moved, holds in ((0.01, True), (0.5, False)):
        side = wanted + moved
        each = _measure(location, CheckedPair(side, wanted, Bound(np.full(400, 1.6))))
        whole = _measure(location, as_a_whole(side, wanted, Bound(np.asarray(0.3 * 20.0))))
        assert each.holds
        assert not each.proven
        assert (whole.holds, whole.proven) == (holds, True)
        if not holds:
            assert "as a whole" in explained(whole)


def test_a_whole_bound_as_large_as_the_tensor_proves_nothing():
    assert not _measure(
        Location(1, "gradient", "w"), as_a_whole(np.ones(4), np.ones(4), Bound(np.asarray(1.9)))
    ).proven


DRAWN, SHAPE = 8, (24, 32)


def bounds_of_draws(
    home: Path, precision: Low, gradients: dict[str, np.ndarray], draws: list[dict[str, np.ndarray]]
) -> MeasuredBounds:
    """Bounds of one step whose gradients are these, and move to those of each draw."""
    reference, *drawn = (Metrics(1.0, 1, 1.0, each) for each in (gradients, *draws))
    save_file(mean_squares(reference, iter(drawn), len(drawn)), home / "step-000001.safetensors")
    writer = TraceWriter(home / "trace")
    writer.initial({})
    writer.step(StepTrace(1, {}, 1.0, 1, 1.0, 1e-3, gradients, updates={}, moment1={}, moment2={}))
    trace = Trace(home / "trace")
    measurement = Measurement((trace, trace), home, len(drawn))
    rule = AdamRule(AdamW(lr=1e-3), frozenset())
    return MeasuredBounds(
        Pair(trace, trace), precision, measurement=measurement, rule=rule, summation=Summation(precision)
    )


@pytest.fixture(scope="module")
def noisy_gradient(tmp_path_factory: pytest.TempPathFactory) -> tuple[MeasuredBounds, np.ndarray]:
    """Bounds of a step whose gradients are moved by rounding half as far as they are large; and the gradient of `w`."""
    rng = np.random.default_rng(0)
    names = ["w", *(f"other{i}" for i in range(20))]
    gradients = {name: rng.standard_normal(SHAPE) for name in names}
    draws = [
        {name: g + 0.5 * rng.standard_normal(SHAPE) for name, g in gradients.items()} for _ in range(DRAWN)
    ]
    return bounds_of_draws(tmp_path_factory.mktemp("noisy"), "bf16", gradients, draws), gradients["w"]


def test_a_peak_whose_roundings_cancel_in_every_draw_may_be_off_by_its_own_rounding(tmp_path: Path):
    """(p - 1) / N of one of four targets, whose two roundings take each other back, among numbers a thousandth as large."""
    rng = np.random.default_rng(3)
    gradient = (rng.standard_normal((4, 400)) * 5e-5).astype(np.float32)
    gradient[range(4), [3, 7, 90, 250]] = -0.0523
    draws = []
    for _ in range(4):
        moved = gradient * (1 + 2.0**-25 * rng.choice([-1, 1], gradient.shape))
        moved[1, 7] = gradient[1, 7]
        draws.append({"w": moved})
    bounds = bounds_of_draws(tmp_path, "fp32", {"w": gradient}, draws)
    location = Location(1, "gradient", "w")
    for roundings, holds in ((2, True), (60, False)):
        side = gradient.copy()
        side[1, 7] *= 1 + roundings * 2.0**-24
        found = _worst(location, bounds.checked_pairs(location, side, gradient))
        assert found.holds == holds, roundings


def test_a_gradient_of_mostly_noise_is_proven_along_itself(noisy_gradient):
    """Rounding reaches half of it in every element; one that is missing, scaled, turned or another's shows all the same."""
    bounds, gradient = noisy_gradient
    location, rng = Location(1, "gradient", "w"), np.random.default_rng(1)
    moved = gradient + 0.5 * rng.standard_normal(SHAPE)
    judged = _worst(location, bounds.checked_pairs(location, moved, gradient))
    assert judged.holds
    assert judged.proven
    assert judged.undetermined > DETERMINED * judged.elements
    mistakes = {
        "missing": np.zeros(SHAPE),
        "halved": gradient / 2,
        "turned": -gradient,
        "another's": rng.standard_normal(SHAPE),
    }
    for name, mistake in mistakes.items():
        found = _worst(location, bounds.checked_pairs(location, moved, mistake))
        assert not found.holds, name
    # What the other two ways make of the smaller ones: nothing.
    ways = ("element by element", "as a whole")
    pairs = [c for c in bounds.checked_pairs(location, moved, mistakes["halved"]) if c.way in ways]
    blind = _worst(location, pairs)
    assert blind.holds
    assert not blind.proven


def test_an_absent_row_must_be_equal_and_a_quiet_one_has_the_tensor_s_own_movement(tmp_path: Path):
    moved = np.outer([0.0, 1e-9, 1e-6], [1.0, 2.0])
    squares = np.square(moved)
    elements = np.zeros_like(squares)
    elements[2, 1] = 1e-8
    save_file(
        {"g/rows": squares.mean(1), "g/columns": squares.mean(0), "g/elements": elements},
        tmp_path / "step-000001.safetensors",
    )
    sigma = Measurement((), tmp_path, 3).sigma(1, "g", (3, 2))
    root_mean_square = np.sqrt(squares.mean())
    assert (sigma[0] == 0).all()
    assert sigma[1] == pytest.approx(root_mean_square)
    assert sigma[2, 0] == pytest.approx(np.maximum(moved[2, 0], root_mean_square))
    assert sigma[2, 1] == pytest.approx(1e-4)  # the element's own


@pytest.mark.parametrize("dof", [2, 6, 18])
def test_a_root_mean_square_is_too_large_by_no_more(dof: int):
    drawn = np.random.default_rng(0).chisquare(dof, 200_000) / dof
    assert np.mean(np.sqrt(drawn) > rms_upper_factor(dof)) < 1e-4
    assert np.mean(np.sqrt(drawn) > rms_upper_factor(dof) ** 0.6) > 1e-5


@pytest.mark.parametrize("dof", [1, 3, 18, 200])
def test_a_root_mean_square_is_too_small_by_no_more(dof: int):
    """Measured at one case in a thousand, where cases can be counted; the factor is smaller there."""
    drawn = np.random.default_rng(0).chisquare(dof, 200_000) / dof
    assert np.mean(np.sqrt(drawn) * rms_lower_factor(dof) < 1) < 1e-4
    assert np.mean(np.sqrt(drawn) * rms_lower_factor(dof) ** 0.3 < 1) > 1e-5


def test_the_largest_of_many_normal_errors_is_covered():
    drawn = np.abs(np.random.default_rng(0).standard_normal((2000, 500))).max(axis=1)
    assert drawn.max() < gaussian_max_quantile(500)
    assert drawn.max() > 0.6 * gaussian_max_quantile(500)


def test_the_size_of_a_rounding_is_that_of_real_ones():
    values = np.exp(np.random.default_rng(0).uniform(0, 20, 400_000))
    relative = values.astype(np.float32).astype(np.float64) / values - 1
    assert np.sqrt(np.mean(relative**2)) == pytest.approx(RMS_ROUNDING * 2.0**-24, rel=0.01)
    assert np.abs(relative).max() <= 2.0**-24


def test_an_array_is_folded_to_rows_and_columns():
    assert [folded(np.zeros(shape)).shape for shape in ((), (3,), (2, 3, 4))] == [(1, 1), (1, 3), (6, 4)]


def test_the_rule_decays_what_the_table_says(lora: Path):
    rule = rule_of(resolve(load_recipe(lora / "r.yaml", ("method={kind: full}",))))
    one, zero = np.ones(3), np.zeros(3)
    for name, decays in (("model.norm.weight", False), ("lm_head.weight", True)):
        moved = rule.update(name, one, zero, zero, lr=0.5, step=1)
        np.testing.assert_array_equal(moved, -0.5 * 0.1 if decays else 0.0)


Q0 = Q1.replace("layers.1", "layers.0")
HEAD = "lm_head.weight"
CLEAN = Sim(steps=2)


def judged_with_noise(
    home: Path,
    noisy: dict[tuple[int, str, str], float],
    *,
    left: Sim = CLEAN,
    right: Sim = CLEAN,
    proof: bool = False,
) -> Comparison:
    """Two runs whose bounds are as large as a share of the elements where it is `noisy`, and elsewhere 1e-6 of them."""
    pair = Pair(*(Trace(write(sim, home / side)) for side, sim in (("a", left), ("b", right))))

    def checked_pairs(location: Location, left: np.ndarray, right: np.ndarray) -> list[CheckedPair]:
        own = 1e-6 * np.abs(left)
        share = noisy.get((location.step, location.phase, location.tensor), 0.0)
        own.ravel()[: round(share * own.size)] = 1.0
        return [CheckedPair(left, right, Bound(own))]

    bounds = ProofBounds(pair) if proof else SimpleNamespace(notes=(), incomparable=lambda *_: None)
    bounds.checked_pairs = checked_pairs
    return compare(pair, bounds)


@pytest.mark.parametrize("phase", ["gradient", "update"])
@pytest.mark.parametrize(("share", "holds"), [(DETERMINED, True), (DETERMINED + 0.1, False)])
def test_a_tensor_that_is_mostly_noise_in_every_layer_and_step_proves_nothing(
    phase: str, share: float, holds: bool, tmp_path: Path
):
    """Equal to the last bit and still no proof: a bound as large as most updates would accept any fault."""
    noisy = {(step, phase, name): share for step in (1, 2) for name in (Q0, Q1)}
    comparison = judged_with_noise(tmp_path, noisy)
    assert comparison.holds == holds
    assert bool(comparison.unproven) != holds
    if not holds:
        first = comparison.first_divergence
        assert first is not None
        assert first.location.phase == phase
        assert "nothing is proven" in str(first.reason)


@pytest.mark.parametrize("proven", [(1, "gradient", Q0), (2, "gradient", Q1)])
def test_a_tensor_that_another_layer_or_step_proves_is_named_and_no_failure(proven, tmp_path: Path):
    places = [(step, "gradient", name) for step in (1, 2) for name in (Q0, Q1)]
    comparison = judged_with_noise(tmp_path, {place: 1.0 for place in places if place != proven})
    assert comparison.holds
    assert len(comparison.unproven) == 3
    verdict = Verdict("bf16", "jax", "torch", comparison)
    assert verdict.word == "pass"
    (note,) = (note for note in verdict.notes if "not provable" in note)
    assert note.startswith("3 of 28 gradients and updates")
    assert f"gradient of {Q1}, step 1" in note
    assert f"step 1, gradient, {Q1}" in verdict.as_json()["unproven"]


def test_in_float64_no_tensor_is_proven_by_its_like(tmp_path: Path):
    noisy = {(1, "gradient", Q1): 1.0}
    assert judged_with_noise(tmp_path / "bf16", noisy).holds  # control
    first = judged_with_noise(tmp_path / "fp64", noisy, proof=True).first_divergence
    assert first is not None
    assert first.location == Location(1, "gradient", Q1)


def test_what_was_proven_before_a_resume_proves_nothing_after_it(tmp_path: Path):
    pair = Pair(*(Trace(write(CLEAN, tmp_path / side)) for side in ("a", "b")))

    def gradient(step: int, *, proven: bool) -> Finding:
        return Finding(
            Location(step, "gradient", Q1), 0.0, 1.0, 0.0, undetermined=4, elements=4, proven=proven
        )

    trained = Finding(Location(1, "update", Q1), 1e-9, 1.0, 0.0, elements=4)
    findings = [gradient(1, proven=True), gradient(2, proven=False), trained]
    assert not list(_unproven(pair, findings, by_their_like=True))  # control
    findings.append(Finding(Location(2, "resume", f"weight/{Q1}"), 0.0, 0.0, 0.0))
    (failure,) = _unproven(pair, findings, by_their_like=True)
    assert failure.location == Location(2, "gradient", Q1)


def test_a_weight_of_no_layer_is_proven_by_itself_at_another_step_alone(tmp_path: Path):
    assert judged_with_noise(tmp_path / "one", {(1, "gradient", HEAD): 1.0}).holds
    assert not judged_with_noise(tmp_path / "all", {(s, "gradient", HEAD): 1.0 for s in (1, 2)}).holds


def test_a_fault_does_not_hide_in_a_tensor_that_is_not_provable(tmp_path: Path):
    """What its bound accepts shows where its like is proven; what is over its bound shows itself."""
    noisy = {(step, "gradient", Q1): 1.0 for step in (1, 2)}
    everywhere = Sim(
        steps=2, gradient_factor=(Q0, 1.001)
    )  # in the code of all layers, seen in the proven one
    first = judged_with_noise(tmp_path / "code", noisy, right=everywhere).first_divergence
    assert first is not None
    assert first.location == Location(1, "gradient", Q0)
    gross = CLEAN.but(gradient_factor=(Q1, 1e3))
    first = judged_with_noise(tmp_path / "gross", noisy, right=gross).first_divergence
    assert first is not None
    assert first.location == Location(1, "gradient", Q1)
    # The moments and updates that follow from a gradient are held to their own bounds, so this shows as well.
    small = CLEAN.but(gradient_factor=(Q1, 1.001))
    assert not judged_with_noise(tmp_path / "small", noisy, right=small).holds


def test_a_gradient_of_zeros_proves_nothing_of_its_like(tmp_path: Path):
    """As LoRA's A has at the first update, while B is zero."""
    zero = CLEAN.but(gradient_factor=(Q0, 0.0))
    noisy = {(step, "gradient", Q1): 1.0 for step in (1, 2)}
    assert not judged_with_noise(tmp_path / "zero", noisy, left=zero, right=zero).holds
    assert judged_with_noise(tmp_path / "other", noisy).holds
