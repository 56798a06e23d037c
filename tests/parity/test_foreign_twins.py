"""Programs of a user, one in JAX and optax and one in torch: equal ones pass, each planted difference is placed.

The differences are those of docs/ports.md, and the page is held to them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from asked import asked_for

from parity.cli import main

HERE = Path(__file__).parent / "twins"
PAGE = Path(__file__).parent.parent.parent / "docs/ports.md"
OPTIMIZERS = ("sgd", "momentum", "adamw", "adamw_bf16", "lion", "adafactor", "muon")
DECAYED = {"conv.weight", "hidden.weight", "head.weight"}
MATRICES = {"hidden.weight", "head.weight"}
PLAIN = {"bn.weight", "bn.bias", "hidden.bias", "norm.weight", "norm.bias", "head.bias"}
ALL = DECAYED | PLAIN


class Shown(NamedTuple):
    """Where a planted difference first shows: the phase and the tensors that it may be in."""

    phase: str
    tensors: set[str]
    step: int = 1


# By torch case.
MISTAKES = {
    "sgd:kernel": Shown("initial", {"conv.weight"}, 0),
    "sgd:transposed": Shown("initial", {"frozen.weight"}, 0),
    "sgd:init": Shown("initial", {"conv.weight"}, 0),
    "adamw:tanh": Shown("activation", {"act"}),
    "sgd:eps": Shown("activation", {"norm"}),
    "sgd:bn_eps": Shown("activation", {"bn"}),
    "lion:padding": Shown("activation", {"conv"}),
    "sgd:dropout": Shown("activation", {"hidden"}),
    "sgd:tf32": Shown("activation", {"conv"}),
    "adamw:mean": Shown("gradient", {"head.weight", "head.bias"}),
    "adamw:clip_slices": Shown("gradient", {"head.weight", "head.bias"}),
    "sgd:warmup": Shown("lr", {"lr"}),
    "adamw:warmup": Shown("lr", {"lr"}),
    "adamw:decay": Shown("update", DECAYED),
    "lion:decay": Shown("update", DECAYED),
    "adamw:mask": Shown("update", PLAIN),
    "lion:mask": Shown("update", PLAIN),
    "adamw:clip": Shown("clip", {"clip_factor"}),
    "adamw:clip_eps": Shown("clip", {"clip_factor"}),
    "sgd:clip": Shown("update", ALL),
    "sgd:hidden_rate": Shown("update", ALL),
    "momentum:clip": Shown("slot", {f"momentum/{name}" for name in ALL}),
    "lion:clip": Shown("slot", {f"momentum/{name}" for name in ALL}),
    "adamw:l2": Shown("moment1", DECAYED),
    "adamw:adam_eps": Shown("update", ALL),
    "adamw:eps_root": Shown("update", ALL),
    "momentum:nesterov": Shown("update", ALL),
    "momentum:dampening": Shown("slot", {f"momentum/{name}" for name in ALL}, 2),
    "muon:torch": Shown("update", MATRICES),
    "muon:scale": Shown("update", MATRICES),
    "muon:uncorrected": Shown("update", MATRICES),
    "muon:decay": Shown("update", MATRICES),
    "adamw_bf16:full_moments": Shown("moment1", ALL),
    "adamw_bf16:stored": Shown("update", ALL),
    "adamw_bf16:l2": Shown("moment1", DECAYED),
    "adafactor:biased": Shown("change", {"bn.running_var"}),
    "sgd:bn_momentum": Shown("change", {"bn.running_mean"}),
    "adamw:frozen": Shown("change", {"frozen.weight"}),
    "sgd:frozen": Shown("change", {"frozen.weight"}),
    "sgd:tau": Shown("change", {"target.weight"}),
    "adamw:tau": Shown("change", {"target.weight"}),
    "sgd:bf16_weights": Shown("update", ALL),
}
# What rounding hides in float32: a relative difference of 1e-6, or one below the rounding of a bfloat16 moment.
FLOAT64_ONLY = {"adamw:clip_eps", "adamw_bf16:stored", "sgd:hidden_rate"}
# What float32 shows at a later step than float64: at step 1 it is the eps of a norm, at 1e-7.
LATER_IN_FLOAT32 = {"muon:uncorrected": 2}
# By case of planted_lm.py, in float64 only.
LANGUAGE_MODEL = {
    "lm:padding_idx": Shown("gradient", {"tokens.weight"}),
    "lm:label_smoothing": Shown("loss", {"loss_sum"}),
    "lm:float_mask": Shown("loss", {"loss_sum"}),
    "lm:softmax32": Shown("gradient", {"head.weight"}),
}
# What passes, and the note that says why it may not be what the user wants.
PASSING = {"sgd:float32_rate": "computes its learning rate in float32", "lm:mask_value": ""}


# Of the fast tests: one difference of the start, and of each phase that a port's mistake shows in.
FAST = {
    ("sgd", "float64"), ("adamw", "float64"), ("sgd:transposed", "float64"), ("adamw:tanh", "float64"), ("adamw:mean", "float64"), ("sgd:warmup", "float64"),
    ("adamw:clip", "float64"), ("adamw:l2", "float64"), ("adamw:mask", "float64"), ("sgd:bn_momentum", "float64"), ("sgd:frozen", "float64"),
}  # fmt: skip


def cases_of(cases: Iterable[str]) -> pytest.MarkDecorator:
    """The test with every case in both precisions."""
    both = ((case, dtype) for case in cases for dtype in ("float64", "float32"))
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(*c, marks=() if c in FAST else pytest.mark.full) for c in both]
    )


def torch_case(case: str) -> bool:
    return not case.startswith("lm:")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The traces of what is asked for, side-optimizer[-mistake]-dtype, and of the language models, lm-CASE."""
    home = tmp_path_factory.mktemp("twins")
    asked = {*asked_for(request, "case", "dtype"), ("sgd", "float32"), ("sgd", "float64")}
    asked |= {(case, "float64") for case in asked_for(request, "case") if case in PASSING}
    runs: list[tuple[str, ...]] = []
    for dtype in ("float64", "float32"):
        cases = sorted(case for case, its in asked if its == dtype and torch_case(case))
        optimizers = sorted({case.partition(":")[0] for case in cases})
        runs += [("jax_program.py", dtype, *optimizers), ("torch_program.py", dtype, *{*optimizers, *cases})]
    names = [case.partition(":")[2] for case in asked_for(request, "case") if not torch_case(case)]
    if names:
        torch_names = [name for name in names if name != "softmax32"]
        runs += [
            ("planted_lm.py", "torch", "torch", *torch_names),
            ("planted_lm.py", "jax", "jax", "softmax32"),
        ]
    for program, *rest in runs:
        argv = [sys.executable, str(HERE / program), str(home), *rest]
        subprocess.run(argv, check=True, timeout=500)
    return home


def verdict_of(left: Path, right: Path, out: Path, *options: str) -> dict:
    code = main(["diff", str(left), str(right), "--out", str(out), *options])
    verdict = json.loads((out / "verdict.json").read_text())
    assert code == (verdict["verdict"] != "pass")
    return verdict


def twins_of(traces: Path, case: str, dtype: str) -> tuple[Path, Path]:
    optimizer = case.partition(":")[0]
    return traces / f"jax-{optimizer}-{dtype}", traces / f"torch-{case.replace(':', '-')}-{dtype}"


@cases_of(OPTIMIZERS)
def test_equal_programs_pass(traces: Path, case: str, dtype: str, tmp_path: Path):
    verdict = verdict_of(*twins_of(traces, case, dtype), tmp_path)
    assert verdict["first_divergence"] is None
    assert verdict["precision"] == {"float64": "fp64", "float32": "fp32"}[dtype]
    assert {"change", "update", "gradient", "activation"} <= set(verdict["worst"])


def assert_shown(first: dict | None, shown: Shown) -> None:
    assert first is not None
    assert (first["step"], first["phase"]) == (shown.step, shown.phase), first
    assert first["tensor"] in shown.tensors


@cases_of(MISTAKES)
def test_a_planted_difference_is_placed(traces: Path, case: str, dtype: str, tmp_path: Path):
    first = verdict_of(*twins_of(traces, case, dtype), tmp_path)["first_divergence"]
    if dtype == "float32" and case in FLOAT64_ONLY:
        assert first is None
    else:
        later = LATER_IN_FLOAT32.get(case) if dtype == "float32" else None
        assert_shown(first, MISTAKES[case]._replace(step=later or MISTAKES[case].step))


@pytest.mark.full
@pytest.mark.parametrize("case", LANGUAGE_MODEL)
def test_a_difference_of_language_models_is_placed(traces: Path, case: str, tmp_path: Path):
    wrong = traces / case.replace(":", "-")
    left, right = (wrong, traces / "lm-torch") if case == "lm:softmax32" else (traces / "lm-jax", wrong)
    assert_shown(verdict_of(left, right, tmp_path)["first_divergence"], LANGUAGE_MODEL[case])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if torch_case(case) else pytest.mark.full) for case in PASSING]
)
def test_what_is_no_difference_passes_with_its_note(traces: Path, case: str, tmp_path: Path):
    twins = twins_of(traces, case, "float64")
    if not torch_case(case):
        twins = traces / "lm-jax", traces / case.replace(":", "-")
    verdict = verdict_of(*twins, tmp_path)
    assert verdict["first_divergence"] is None
    assert any(PASSING[case] in note for note in verdict["notes"]) or not PASSING[case]


def test_a_side_in_float32_is_judged_in_float32_and_its_converted_batch_is_named(
    traces: Path, tmp_path: Path
):
    left, right = traces / "jax-sgd-float32", traces / "torch-sgd-float64"
    verdict = verdict_of(left, right, tmp_path)
    assert verdict["precision"] == "fp32"
    first = verdict["first_divergence"]
    assert (first["step"], first["phase"]) == (1, "batch")
    assert "float32 in left, float64 in right" in first["reason"]
    proof = verdict_of(left, right, tmp_path, "--precision", "fp64")["first_divergence"]
    assert (proof["step"], proof["phase"]) == (0, "initial")
    assert "fp64 wants float64" in proof["reason"]


def rows() -> dict[str, str]:
    """Of each row of the page's tables: how it shows, by the case that plants it."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[-1].strip("` "): cells[-3] for cells in lines if cells[-1].strip().startswith("`")}


def test_the_page_says_what_is_planted():
    table = rows()
    planted = {case: (f"`{shown.phase}`", shown.step) for case, shown in (MISTAKES | LANGUAGE_MODEL).items()}
    planted |= {case: ("passes", 1) for case in PASSING}
    planted |= {"sgd:x64": ("`batch`", 1)}  # test_a_side_in_float32...
    planted |= {"twin_lm_torch --mean-of-means": ("`gradient`", 1)}  # tests/parity/test_examples.py
    planted |= {"twin_bn_torch --eval-mode": ("`activation`", 1)}
    assert set(table) <= set(planted)
    for case, shows in table.items():
        phase, step = planted[case]
        stated = re.match(r"(?:step (\d), )?(`\w+`|passes)", shows)
        assert stated, shows
        assert (stated[2], int(stated[1] or 1)) == (phase, step), case
    kinds = {case.partition(":")[2] or case for case in planted}
    assert {case.partition(":")[2] or case for case in table} == kinds
