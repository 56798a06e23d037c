"""Every named fault is caught at its location, on both backends; one that is none is reported as missed.

The registry is checked against the sources always, a sample is trained in `make test`, all of it in `make test-full`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from asked import asked_for
from many import run_many
from small import ROOT

from parity.comparison.compare import Finding
from parity.comparison.phases import PHASES, Location
from parity.diagnosis.causes import CAUSES
from parity.faults import FAULTS, SHARED, Fault, Where
from parity.faults import run as faults_run
from parity.faults.fault import SETUPS, setup_recipe
from parity.faults.outcome import Outcome
from parity.faults.results import collected, result_of, store
from parity.faults.run import BACKENDS, chosen, clean_pair, home_of, run_faults, whole_trace
from parity.faults.table import help_summary, page, result_lines
from parity.faults.written_out import ADAMW_WRITTEN_OUT, ATTENTION_WRITTEN_OUT
from parity.runs.edit import Edit, PlantError, edited
from parity.runs.fixture import TinySetup
from parity.runs.launch_many import Case, CaseResult, _shares
from trainspec.errors import UserError
from trainspec.plans.plan import Backend, Policy

# In the loss and the update, and one on two devices; with the long tests one that must pass, and one of a resume.
SAMPLE = ("label-shift", "update-lost", "vocab-offset-in-loss")
MORE = ("rope-all-offset", "resume-casts-moments")
# No mistakes: unchanged substitutes for a library's code, and an edit without effect.
HARMLESS = Fault(
    name="harmless",
    imitates="nothing",
    source="-",
    cause=None,
    where=None,
    edits={
        "jax": (Edit("jaxtrain.optim", "CLIP_EPS = 1e-6", "CLIP_EPS = 2e-6 / 2"),),
        "torch": (*ATTENTION_WRITTEN_OUT, *ADAMW_WRITTEN_OUT),
    },
)
SAMPLED = [
    pytest.param(fault.name, backend, marks=pytest.mark.full if fault.name in MORE else ())
    for fault in (*chosen([*SAMPLE, *MORE]), HARMLESS)
    for backend in BACKENDS
    if fault.applies(backend, "fp64")
]
# The same, declared a mistake: it must come out as missed.
NOT_THERE = replace(HARMLESS, name="not-there", where=Where("update", ".*"))
# A real mistake, declared to show elsewhere.
ELSEWHERE = replace(chosen(["label-shift"])[0], name="elsewhere", where=Where("update", ".*"))
NO_RUN = replace(
    HARMLESS,
    name="no-run",
    edits={"jax": (Edit("jaxtrain.optim", "CLIP_EPS = 1e-6", "CLIP_EPS = 1 / 0"),)},
)


SUBSTITUTES = "parity.faults.substitutes"


def source_of(module: str) -> str:
    spec = find_spec(module)
    assert spec
    assert spec.origin
    return Path(spec.origin).read_text()


def changed_by(edits: Sequence[Edit], module: str) -> ast.Module:
    return edited(source_of(module), [edit for edit in edits if edit.module == module])


def test_the_registry_is_whole():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))
    assert sum(fault.where is not None for fault in FAULTS) >= 40
    for fault in FAULTS:
        assert fault.imitates
        assert fault.source
        assert fault.setup in SETUPS
        places = [where for where in (fault.where, *fault.later_in.values()) if where]
        assert {where.phase for where in places} <= {phase.name for phase in PHASES}
        # fp64 hides nothing, and what is below a bound shows nowhere.
        assert not {"fp64", *fault.below_bound_in} & set(fault.later_in), fault.name
        # What a diagnosis must name; nothing where the check must pass.
        assert fault.cause in (CAUSES if fault.where else (None,)), fault.name
        # A fault that must pass and a backend without edits are explained.
        assert fault.note or (fault.where and set(fault.edits) == set(BACKENDS)), fault.name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_edit_fits_the_source(fault: Fault, backend: Backend):
    """A refactoring that removes the code a fault edits is noticed here, without any training."""
    edits = fault.edits.get(backend, ())
    for module in {edit.module for edit in edits}:
        assert module.startswith(("trainspec.", f"{backend}train.", f"{SUBSTITUTES}.{backend}_"))
        source, changed = source_of(module), changed_by(edits, module)
        assert ast.unparse(changed) != ast.unparse(ast.parse(source))
        compile(changed, module, "exec")


def test_an_edit_that_no_longer_fits_is_an_error():
    with pytest.raises(PlantError, match="0 times, not once"):
        changed_by([Edit("jaxtrain.loss:token_loss", "not_there(__x)", "__x")], "jaxtrain.loss")


def undefined(directory: Path, every: list[tuple[str, tuple[Edit, ...]]]) -> str:
    """What ruff says about undefined names in the edited modules."""
    for name, edits in every:
        for module in {edit.module for edit in edits}:
            (directory / f"{name}-{module}.py").write_text(ast.unparse(changed_by(edits, module)))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823"]
    return subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False).stdout


def test_what_is_put_in_names_what_is_there(tmp_path: Path):
    """A variable that only the replacement names may have been renamed."""
    every = [(f"{f.name}-{backend}", edits) for f in FAULTS for backend, edits in f.edits.items()]
    every += [(f.name, (f.edit,)) for f in SHARED]
    assert undefined(tmp_path, every) == "All checks passed!\n"
    wrong = Edit("jaxtrain.loss:target_loss", "__logits.astype(__wide)", "__it + not_there")
    assert "`not_there`" in undefined(tmp_path, [("wrong", (wrong,))])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def sampled(root: Path, request: pytest.FixtureRequest) -> dict[tuple[str, str], Outcome]:
    names = dict.fromkeys((*SAMPLE, *asked_for(request, "name")))
    faults = (*chosen([name for name in names if name != HARMLESS.name]), HARMLESS, NO_RUN)
    outcomes = run_faults(faults, BACKENDS, root, keep=True)
    return {(outcome.fault.name, outcome.backend): outcome for outcome in outcomes}


@pytest.mark.parametrize(("name", "backend"), SAMPLED)
def test_a_sample_is_caught_at_its_location(
    sampled: dict[tuple[str, str], Outcome], name: str, backend: Backend
):
    outcome = sampled[name, backend]
    assert outcome.as_expected, (outcome.word, outcome.said, outcome.crash)
    assert outcome.word == ("caught" if outcome.fault.where else "passes")


@pytest.mark.parametrize(("name", "backend"), SAMPLED)
def test_the_diagnosis_of_a_sample_names_its_cause(
    sampled: dict[tuple[str, str], Outcome], name: str, backend: Backend
):
    outcome = sampled[name, backend]
    assert outcome.help == ("helpful" if outcome.fault.where else None), outcome.diagnosis
    assert result_of(outcome).help == outcome.help


def test_a_diagnosis_that_names_another_cause_misleads_and_one_that_names_none_is_silent(
    sampled: dict[tuple[str, str], Outcome],
):
    shifted = sampled["label-shift", "jax"]
    assert shifted.diagnosis
    elsewhere = replace(shifted, fault=replace(shifted.fault, cause="data-order"))
    nothing = replace(shifted, diagnosis=replace(shifted.diagnosis, causes=()))
    assert (elsewhere.help, nothing.help) == ("misleading", "silent")
    outcomes = (shifted, elsewhere, nothing, sampled["harmless", "jax"])
    said = help_summary([result_of(outcome) for outcome in outcomes])
    assert said == "diagnosis: 1 of 3 helpful (33.3%), 1 silent, 1 misleading"
    lines = "\n".join(result_lines([elsewhere]))
    assert "misleading: label-shift" in lines
    assert "expected cause: data-order" in lines


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_control_of_the_controls(sampled: dict[tuple[str, str], Outcome], backend: Backend):
    for name, fault, word in (
        (HARMLESS.name, NOT_THERE, "MISSED"),
        ("label-shift", ELSEWHERE, "MISPLACED"),
    ):
        outcome = replace(sampled[name, backend], fault=fault)
        assert (outcome.word, outcome.as_expected) == (word, False)
    false_alarm = replace(sampled["label-shift", backend], fault=HARMLESS)
    assert (false_alarm.word, false_alarm.as_expected) == ("FALSE ALARM", False)


def test_only_what_is_said_to_be_below_a_bound_may_pass_there():
    [small], [large] = chosen(["clip-without-epsilon"]), chosen(["label-shift"])
    passed = Outcome(small, "jax", "fp32", None)
    assert (passed.word, passed.as_expected) == ("below bound", True)
    late = replace(passed, divergence=Finding(Location(2, "clip", "clip_factor"), 1.1e-6, 1e-6, 1.1))
    assert (late.word, late.as_expected) == ("caught", True)
    assert not replace(late, precision="fp64").as_expected
    for outcome in (replace(passed, precision="fp64"), replace(passed, fault=large)):
        assert (outcome.word, outcome.as_expected) == ("MISSED", False)


def test_a_fault_may_show_later_where_rounding_hides_its_place():
    [smoothing] = chosen(["label-smoothing"])
    loss, gradient = Location(1, "loss", "loss_sum"), Location(1, "activation_gradient", "logits")
    said = {where: Finding(where, 0.1, 0.01, 10.0) for where in (loss, gradient)}
    words = {
        (precision, where.phase): Outcome(smoothing, "jax", precision, finding).word
        for precision in ("fp32", "bf16")
        for where, finding in said.items()
    }
    assert words == {
        ("fp32", "loss"): "caught",
        ("fp32", "activation_gradient"): "MISPLACED",
        ("bf16", "loss"): "caught",
        ("bf16", "activation_gradient"): "caught",
    }
    assert Outcome(smoothing, "jax", "bf16", None).word == "MISSED"
    assert (
        Outcome(smoothing, "jax", "bf16", Finding(replace(loss, step=2), 0.1, 0.01, 10.0)).word == "MISPLACED"
    )


def test_a_fault_out_of_reach_in_fp32_is_not_planted_there():
    [fault] = chosen(["clip-by-local-norm"])
    assert [fault.applies(b, "fp64") for b in BACKENDS] == [True, True]
    assert [fault.applies(b, "fp32") for b in BACKENDS] == [True, False]
    [split] = chosen(["optimizer-shard-not-updated"])
    assert [split.applies(b, "fp64") for b in BACKENDS] == [True, False]
    assert [split.applies(b, "fp32") for b in BACKENDS] == [True, True]


def test_a_plan_that_a_backend_refuses_is_compared_with_one_device(tmp_path: Path):
    tiny = TinySetup(tmp_path)
    devices: dict[Policy, list[int]] = {"fp64": [2, 1], "fp32": [2, 2]}
    for setup in ("zero1", "pipe"):
        for precision, expected in devices.items():
            assert [setup_recipe(tiny, setup, precision, b).plan.devices for b in BACKENDS] == expected


def test_a_fault_that_does_not_run_is_no_catch(sampled: dict[tuple[str, str], Outcome]):
    outcome = sampled[NO_RUN.name, "jax"]
    assert (outcome.word, outcome.as_expected) == ("CRASHED", False)
    assert outcome.crash
    assert "ZeroDivisionError" in outcome.crash
    assert (NO_RUN.name, "torch") not in sampled  # a backend that a fault does not apply to


def test_a_fault_whose_clean_run_failed_is_no_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of such a fault is trained, so there is no trace to judge; other set-ups go on."""
    [resumed], [other] = chosen(["resume-casts-moments"]), chosen(["label-shift"])
    clean = clean_pair(resumed.setup)
    recipes = {f.setup: setup_recipe(TinySetup(tmp_path), f.setup, "fp64", "jax") for f in (resumed, other)}
    launched: list[Case] = []

    def run_cases(_: Backend, cases: Sequence[Case], **__: object) -> list[CaseResult]:
        launched.extend(cases)
        return [
            CaseResult(3, "no memory")
            if str(home_of(tmp_path, "jax", clean)) in case.argv[3]
            else CaseResult(0)
            for case in cases
        ]

    monkeypatch.setattr(faults_run, "run_cases", run_cases)
    crashes = faults_run._train("jax", [clean, resumed, other], recipes, tmp_path)
    assert len(launched) == 2
    assert crashes == {
        ("jax", clean.name): "no memory",
        ("jax", resumed.name): "the clean run that it resumes failed",
    }
    outcome = faults_run._judge(resumed, "jax", [recipes[resumed.setup]], crashes, tmp_path)
    assert (outcome.word, outcome.crash) == ("CRASHED", "the clean run that it resumes failed")


@pytest.mark.full
def test_a_diff_of_the_traces_says_the_same(sampled: dict[tuple[str, str], Outcome], root: Path):
    """The verdict as a user gets it: exit code 1 and the location; 0 without a mistake."""
    faults = [*chosen([name for name, _ in sampled if name in SAMPLE]), HARMLESS]
    faults += [clean_pair(setup) for setup in dict.fromkeys(fault.setup for fault in faults)]
    cases = [(fault, backend) for fault in faults for backend in BACKENDS if fault.applies(backend, "fp64")]
    argvs = []
    for fault, backend in cases:
        traces = [
            str(home_of(root, b, fault) / "trace" if b == backend else whole_trace(root, b, fault.setup))
            for b in BACKENDS
        ]
        argvs.append(["diff", *traces, "--out", str(root / "diff" / fault.name / backend)])
    for (fault, backend), result in zip(cases, run_many("parity", argvs, root / "many"), strict=True):
        verdict = json.loads((root / "diff" / fault.name / backend / "verdict.json").read_text())
        if fault.where is None:
            assert (result["code"], verdict["verdict"]) == (0, "pass")
        else:
            assert (result["code"], verdict["verdict"]) == (1, "fail")
            assert verdict["first_divergence"]["phase"] == fault.where.phase


def test_cases_of_one_recipe_stay_together():
    cases = [Case(("train", recipe, str(n))) for n, recipe in enumerate("aababcdb")]
    assert _shares(cases, 2) == [[0, 1, 3, 5], [2, 4, 7, 6]]
    assert _shares(cases[:2], 2) == [[0, 1]]


def test_the_command_line(root: Path):
    listing, unknown = run_many(
        "parity", [["faults", "--list"], ["faults", "--only", "rope-tehta"]], root / "command"
    )
    assert listing["code"] == 0
    assert all(f"\n{fault.name}: " in f"\n{listing['out']}" for fault in FAULTS)
    assert unknown["code"] == 2
    assert unknown["err"] == "parity: --only rope-tehta: no such fault; did you mean 'rope-theta'?\n"


def missed(fault: Fault, backend: Backend, precision: Policy) -> Outcome:
    return Outcome(fault, backend, precision, None)


def every_outcome(precision: Policy) -> list[Outcome]:
    return [missed(f, b, precision) for f in FAULTS for b in BACKENDS if f.applies(b, precision)]


def test_results_of_parts_are_kept_together(tmp_path: Path):
    outcomes = [missed(clean_pair("full"), "torch", "fp64"), *every_outcome("fp64")]
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
    store(first, outcomes[:20])
    store(first, outcomes[10:30])  # of which some are made again
    store(second, outcomes[30:])
    with pytest.raises(
        UserError, match=rf"no result of {len(outcomes) - 30} of {len(outcomes) - 1} faults: "
    ):
        collected([first])
    results = collected([second, first])
    assert [(r.fault, r.backend) for r in results] == [(o.fault.name, o.backend) for o in outcomes]
    text = page(results)
    assert "## fp64" in text
    assert "## fp32" not in text
    assert text.count("| MISSED |") == sum(
        f.where is not None for f in FAULTS for b in BACKENDS if f.applies(b, "fp64")
    )


def test_results_of_other_code_make_no_page(tmp_path: Path):
    store(tmp_path, every_outcome("fp64"))
    stored = json.loads((tmp_path / "faults.json").read_text())
    other = stored | {"sources": stored["sources"][::-1]}
    (tmp_path / "faults.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="of other code than this"):
        collected([tmp_path])
    store(tmp_path, every_outcome("fp32"))
    kept = json.loads((tmp_path / "faults.json").read_text())
    assert kept["sources"] == stored["sources"]
    assert {entry["precision"] for entry in kept["results"]} == {"fp32"}
    for text, said in (("{}", "not what parity faults"), (None, "missing")):
        path = tmp_path / "faults.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(UserError, match=said):
            collected([tmp_path])


PROVEN: tuple[Policy, Policy] = ("fp64", "fp32")
# A set-up of as few faults is run in one precision, so that its clean runs are made once.
FEW = 3
# About as many plantings as a test has: it takes a few minutes of two cores.
IN_A_TEST = 36


def planted_in() -> dict[Policy, list[Fault]]:
    """Every fault in each backend that may have it, once: by precision, with the edits of the backends that have it there.

    The faults of a set-up take turns: one is in fp64 on JAX and in fp32 on torch, the next the other way round. Of set-ups of
    few faults one has all of its in fp64, the next in fp32. What cannot be planted in one of the precisions (torch has no
    split optimizer in fp64) is in the other. `make docs` plants all of them in every precision, for the page.
    """
    by_setup: dict[str, list[Fault]] = {}
    for fault in FAULTS:
        by_setup.setdefault(fault.setup, []).append(fault)
    found: dict[Policy, list[Fault]] = {precision: [] for precision in PROVEN}
    for number, faults in enumerate(by_setup.values()):
        for i, fault in enumerate(faults):
            edits: dict[Policy, dict[Backend, tuple[Edit, ...]]] = {precision: {} for precision in PROVEN}
            for j, backend in enumerate(BACKENDS):
                turn = number if len(faults) <= FEW else i + j
                able = [p for p in (PROVEN[turn % 2], PROVEN[1 - turn % 2]) if fault.applies(backend, p)]
                if able:
                    edits[able[0]][backend] = fault.edits[backend]
            for precision in PROVEN:
                if edits[precision]:
                    found[precision].append(replace(fault, edits=edits[precision]))
    return found


def parts() -> list[tuple[Policy, int, tuple[Fault, ...]]]:
    """`planted_in` in parts for a test each; a set-up is in as few of them as it may."""
    found: list[tuple[Policy, list[Fault]]] = []
    for precision, faults in planted_in().items():
        found.append((precision, []))
        for fault in faults:
            if sum(len(each.edits) for each in found[-1][1]) + len(fault.edits) > IN_A_TEST:
                found.append((precision, []))
            found[-1][1].append(fault)
    return [(precision, number, tuple(part)) for number, (precision, part) in enumerate(found)]


def test_every_fault_is_planted_once_in_each_backend_and_both_precisions_have_their_share():
    found = planted_in()
    planted = [(f.name, b) for faults in found.values() for f in faults for b in f.edits]
    assert sorted(planted) == sorted(
        (f.name, b) for f in FAULTS for b in f.edits if any(f.applies(b, p) for p in PROVEN)
    )
    in_parts = [(precision, fault) for precision, _, part in parts() for fault in part]
    assert in_parts == [(precision, fault) for precision, faults in found.items() for fault in faults]
    for precision, faults in found.items():
        for backend in BACKENDS:
            count = sum(backend in fault.edits for fault in faults)
            assert 0.4 < count / len(FAULTS) < 0.6, (precision, backend, count)


@pytest.mark.full(minutes=5)
@pytest.mark.parametrize(
    ("precision", "faults"), [pytest.param(p, part, id=f"{p}-{number}") for p, number, part in parts()]
)
def test_every_fault_is_caught_at_its_location(tmp_path: Path, precision: Policy, faults: tuple[Fault, ...]):
    """And what the diagnosis is worth is what the page says."""
    outcomes = run_faults(faults, BACKENDS, tmp_path, precision=precision)
    wrong = [outcome for outcome in outcomes if not outcome.as_expected]
    assert not wrong, "\n".join(result_lines(wrong))
    results = [result for result in map(result_of, outcomes) if result.is_planted]
    assert [(r.fault, r.backend) for r in results] == [
        (f.name, b) for f in faults for b in BACKENDS if b in f.edits
    ]
    shown = shown_on_the_page()
    assert {(r.fault, r.backend): r.help for r in results} == {
        (r.fault, r.backend): shown[precision, r.fault, r.backend] for r in results
    }


def shown_on_the_page() -> dict[tuple[str, str, str], str | None]:
    """The last column of docs/faults.md by precision, fault and backend."""
    shown: dict[tuple[str, str, str], str | None] = {}
    precision = ""
    for line in (ROOT / "docs/faults.md").read_text().splitlines():
        precision = line[3:] if line.startswith("## ") else precision
        if row := re.match(r"\| ([a-z0-9-]+) \| (jax|torch) \|.* \| (\S+) \|$", line):
            shown[precision, row[1], row[2]] = None if row[3] == "–" else row[3]
    return shown


def test_the_page_in_docs_is_of_these_faults():
    """`parity faults --page docs/faults.md` writes it; faults added since are missing."""
    shown = shown_on_the_page()
    for precision in PROVEN:
        wanted = {(f.name, b) for f in FAULTS for b in BACKENDS if f.applies(b, precision)}
        assert {(fault, backend) for p, fault, backend in shown if p == precision} == wanted
        given = [word for (p, *_), word in shown.items() if p == precision and word]
        assert given.count("helpful") >= 0.9 * len(given)
        assert "misleading" not in given
