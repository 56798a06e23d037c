"""`parity matrix`: the shipped page has exactly the matrix's cells, one real cell runs, and a failing cell shows as fail."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
from synthetic import Q1, Sim, write

from parity.cli import main
from parity.matrix.cells import (
    BACKENDS,
    FAMILY_METHODS,
    FAMILY_PLANS,
    PLANS,
    PRECISIONS,
    Cell,
    CellResult,
    cells,
    family_cells,
    judge,
    refusals,
    run_matrix,
    select,
)
from parity.matrix.pages import FAMILIES_PAGE, STATUS_PAGE
from parity.matrix.status import status_lines, status_page
from parity.runs.fixture import FAMILIES, METHODS, OF_FAMILIES, VARIANTS, TinySetup
from parity.runs.plans import refusal
from trainspec.errors import UserError
from trainspec.families import FAMILIES as ALL_FAMILIES
from trainspec.methods import LoRA, PrefixTuning
from trainspec.plans.capabilities import check_fits
from trainspec.plans.plan import Plan, Policy

ROOT = Path(__file__).parent.parent.parent
SPECS = VARIANTS | FAMILIES
CELL = Cell("plain", "full", "packed-2", "one-device", "fp64")


def names_on(page: str) -> list[str]:
    start = page.index("\n## ", page.index("## Methods and plans"))
    page = page[start:].split("## What is refused")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return ["/".join(row[:5]) for row in rows if row[0] not in ("model", "---")]


@pytest.mark.parametrize(("page", "listed"), [(STATUS_PAGE, cells()), (FAMILIES_PAGE, family_cells())])
def test_a_shipped_page_has_a_row_for_every_cell_and_no_other(page: Path, listed: list[Cell]):
    shown = names_on((ROOT / page).read_text())
    assert len(shown) == len(set(shown))
    assert set(shown) == {str(cell) for cell in listed}


def test_the_cells_are_distinct_and_cover_every_table_entry():
    assert len({*cells(), *family_cells()}) == len(cells()) + len(family_cells())
    assert {cell.plan for cell in cells()} == set(PLANS)
    assert {cell.precision for cell in cells()} == set(PRECISIONS)
    planned = {(cell.plan, cell.policy) for cell in cells()}
    assert planned == {(plan, p) for plan in PLANS for p in get_args(Policy)}
    assert {cell.model for cell in cells()} == {*VARIANTS}
    assert {cell.model for cell in family_cells()} == {*FAMILIES}


def test_every_method_is_run_on_every_plan_and_none_is_left_out_silently():
    proven = {(cell.method, cell.plan) for cell in cells() if cell.precision == "fp64"}
    assert proven == set(itertools.product(METHODS, PLANS))
    coarse = {(cell.method, cell.plan) for cell in cells() if cell.precision == "fp32"}
    split = {
        plan
        for plan in PLANS
        if refusal(PLANS[plan], "fp64", "torch") and not refusal(PLANS[plan], "fp32", "torch")
    }
    assert coarse >= set(itertools.product(METHODS, split))  # where DeepSpeed works
    table = (ROOT / "docs/parity-status.md").read_text().split("## Methods and plans")[1].split("\n## ")[0]
    assert "not run" not in table
    assert table.count("\n| ") == len(PLANS) + 2


def test_every_family_is_run_with_every_kind_of_method_on_every_kind_of_plan():
    of_families = family_cells()
    proven = {
        (c.model, c.method, c.plan)
        for c in of_families
        if c.precision == "fp64" and c.method in FAMILY_METHODS
    }
    assert proven == set(itertools.product(FAMILIES, FAMILY_METHODS, FAMILY_PLANS))
    assert {spec.family for spec in FAMILIES.values()} == set(ALL_FAMILIES) - {"llama"}
    used = [PLANS[name] for name in FAMILY_PLANS]
    assert any(plan.pipe > 1 and plan.fsdp > 1 and plan.tensor > 1 for plan in used)
    assert {"fp32", "bf16"} < {cell.precision for cell in of_families}


def test_what_one_family_alone_has_is_run_on_one_device_and_sharded_on_both_backends():
    for family, methods in OF_FAMILIES.items():
        for name in methods:
            run = [c for c in family_cells() if (c.model, c.method) == (family, name)]
            assert any(c.plan == "one-device" and c.precision == "fp64" for c in run)
            split = [c for c in run if PLANS[c.plan].devices > 1]
            assert split
            assert not any(map(refusals, split))
            assert any(c.plan != "one-device" and c.policy == "bf16" for c in run)
    prefix = OF_FAMILIES["chatglm2"]["published-prefix"]
    assert isinstance(prefix, PrefixTuning)
    assert (prefix.positions, prefix.projected, prefix.dropout > 0) == ("from_zero", "all_layers", True)
    one_a = OF_FAMILIES["chatglm2"]["one-a"]
    assert isinstance(one_a, LoRA)
    assert one_a.published_targets(FAMILIES["chatglm2"])


def test_what_was_not_run_or_failed_stands_out(tmp_path: Path):
    left, right = write(Sim(), tmp_path / "left"), write(Sim(gradient_factor=(Q1, 1.1)), tmp_path / "right")
    passed = judge(CELL, left, left)
    failed = judge(replace(CELL, method="lora", plan="data-2"), left, right)
    table = status_page([passed, failed]).split("## Methods and plans")[1].split("\n## ")[0]
    assert "| one-device | fp64 | **not run** |" in table
    assert "| data-2 | **not run** | **fp64: fail** |" in table


def test_every_plan_runs_on_jax_and_divides_model_and_batch(tmp_path: Path):
    for cell in (*cells(), *family_cells()):
        assert "jax" not in refusals(cell)
        for backend in BACKENDS:
            recipe = cell.recipe(TinySetup(tmp_path), backend)
            check_fits(
                recipe.plan,
                SPECS[cell.model],
                global_examples=recipe.batch.global_examples,
                accumulation=recipe.batch.accumulation,
                backend=BACKENDS[backend],
            )


def test_pipelines_are_of_every_schedule_and_do_not_all_divide_the_layers():
    pipes = [(PLANS[cell.plan], SPECS[cell.model].layers) for cell in cells() if PLANS[cell.plan].pipe > 1]
    assert {plan.schedule for plan, _ in pipes} == {"gpipe", "1f1b", "interleaved"}
    assert any(layers % (plan.pipe * plan.chunks_per_stage) for plan, layers in pipes)


def test_what_both_refuse_stands_on_the_page_with_their_line(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(PLANS, "microbatches-2", Plan(microbatches=2))
    cell = Cell("plain", "lora", "packed-2", "microbatches-2", "fp64")
    assert set(refusals(cell)) == {"jax", "torch"}
    page = status_page(run_matrix([cell], out=tmp_path))  # trains nothing
    assert names_on(page) == [str(cell)]
    assert "there is no pipeline with plan.pipe=1" in page
    assert "0 pass, 0 fail, 1 unsupported" in page


def test_a_plan_that_one_backend_refuses_runs_there_on_one_device_and_the_page_says_so(tmp_path: Path):
    cell = Cell("plain", "full", "packed-2", "zero3-2", "fp64")
    assert set(refusals(cell)) == {"torch"}
    assert [cell.recipe(TinySetup(tmp_path), b).plan.devices for b in BACKENDS] == [2, 1]
    result = judge(cell, write(Sim(), tmp_path / "left"), write(Sim(), tmp_path / "right"))
    page = status_page([replace(result, refused=refusals(cell))])
    assert "| zero3-2 | fp64 | torch | pass |" in page
    assert "DeepSpeed has no float64" in page


@pytest.fixture
def planted(tmp_path: Path) -> CellResult:
    """The result of two runs that differ in one gradient."""
    left = write(Sim(), tmp_path / "left")
    return judge(CELL, left, write(Sim(gradient_factor=(Q1, 1 + 1e-5)), tmp_path / "right"))


def run(results: list[CellResult], out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """`parity matrix`, with the training already done."""
    monkeypatch.setattr("parity.commands.run_matrix", lambda chosen, out: results)
    out.mkdir(exist_ok=True)
    return main(["matrix", "--only", str(CELL), "--out", str(out)])


def test_a_failing_cell_shows_as_fail_with_its_first_divergence(
    planted: CellResult, tmp_path, monkeypatch, capsys
):
    assert run([planted], tmp_path, monkeypatch) == 1
    assert f"FAIL  {CELL}: step 1, gradient, {Q1}" in capsys.readouterr().out
    page = (tmp_path / "parity-status.md").read_text()
    assert "0 pass, 1 fail, 0 unsupported" in page
    assert "**fail**" in page
    assert f"step 1, gradients, `{Q1}`" in page
    [entry] = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert (entry["verdict"], entry["phase"], entry["tensor"]) == ("fail", "gradient", Q1)
    assert entry["bound_used"] == pytest.approx(entry["error"] / entry["bound"])
    assert entry["bound_used"] > 1


def test_a_cell_without_a_difference_passes(tmp_path: Path, monkeypatch):
    left, right = write(Sim(), tmp_path / "left"), write(Sim(fused=True), tmp_path / "right")
    result = judge(CELL, left, right)
    assert result.verdict == "pass"
    assert run([result], tmp_path, monkeypatch) == 0


def test_a_cell_whose_trace_is_missing_fails(tmp_path: Path):
    result = judge(CELL, write(Sim(), tmp_path / "left"), tmp_path / "nowhere")
    assert result.verdict == "fail"
    assert "missing" in status_page([result])


def test_no_cell_of_that_name_is_a_persons_mistake():
    with pytest.raises(UserError, match="no cell"):
        select("qlora")


@pytest.mark.full
def test_one_real_cell_runs_on_both_backends(tmp_path: Path, capsys):
    only = "tied/prefix-projection/packed-2/one-device/fp64"
    assert main(["matrix", "--only", only, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    [entry] = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert entry["verdict"] == "pass"
    assert 0 < entry["error"] < entry["bound"] < 1e-8
    assert 0 < entry["bound_used"] < 1
    assert names_on((tmp_path / "parity-status.md").read_text()) == [only]


Pair = tuple[tuple[str, str], ...]


def axes_of(cell: Cell) -> str:
    """The axes over which the cell's plan has several devices."""
    sizes = PLANS[cell.plan].model_dump()
    return " ".join(axis for axis in ("data", "fsdp", "tensor", "pipe") if sizes[axis] > 1)


def pairs_of(cell: Cell) -> set[Pair]:
    """Every two of what a cell is made of, of its plan the parts: its method and its axes, its axes and its precision, and so
    on. Beside these the plan itself with the precision.
    """
    plan = PLANS[cell.plan]
    made_of = {
        "model": cell.model,
        "method": cell.method,
        "batch": cell.batch,
        "precision": cell.precision,
        "axes": axes_of(cell),
        "shards": plan.shards,
        "schedule": plan.schedule if plan.pipe > 1 else "none",
        "remat": plan.remat,
    }
    return {*itertools.combinations(made_of.items(), 2), (("plan", cell.plan), ("precision", cell.precision))}


def covering(listed: Sequence[Cell]) -> list[Cell]:
    """Cells that have every pair that any listed cell has: always the one with most pairs that are still missing."""
    missing, chosen = set().union(*map(pairs_of, listed)), []
    while missing:
        chosen.append(max(listed, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


@pytest.mark.parametrize("listed", [cells(), family_cells()])
def test_the_cells_that_the_tests_run_have_every_pair_of_settings(listed: list[Cell]):
    chosen = covering(listed)
    assert set(chosen) <= set(listed)
    pairs = set().union(*map(pairs_of, listed))
    assert set().union(*map(pairs_of, chosen)) == pairs
    plan = chosen[0].plan
    assert set().union(*(pairs_of(cell) for cell in chosen if cell.plan != plan)) < pairs  # control
    # Every plan in every precision that it is run in; every method and every family over all axes together.
    for names in (("plan", "precision"), ("model", "method"), ("method", "batch")):
        of = attrgetter(*names)
        assert set(map(of, chosen)) == set(map(of, listed))
    for name in ("method", "model"):
        over = {(getattr(cell, name), axes_of(cell)) for cell in listed}
        assert {(getattr(cell, name), axes_of(cell)) for cell in chosen} == over


def assert_all_pass(chosen: Sequence[Cell], out: Path) -> None:
    results = run_matrix(chosen, out=out)
    assert [result.verdict for result in results] == ["pass"] * len(chosen), status_lines(results)


@pytest.mark.full(minutes=5)
@pytest.mark.parametrize("devices", sorted({plan.devices for plan in PLANS.values()}))
def test_every_pair_of_settings_passes(tmp_path: Path, devices: int):
    """Every method over all axes together, with every way to split weights, every schedule, every model and every batch; every
    plan in every precision. Cells whose pairs other cells have are not run here: `make docs` runs them, for the page.
    """
    assert_all_pass([cell for cell in covering(cells()) if PLANS[cell.plan].devices == devices], tmp_path)


@pytest.mark.full(minutes=3)
def test_every_pair_of_settings_of_families_passes(tmp_path: Path):
    assert_all_pass(covering(family_cells()), tmp_path)
