"""Records of clean runs: which are run again, which seeds may test, and what the page says of their code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small import ROOT
from synthetic import Q1, Sim, write

from parity.comparison.compare import compare
from parity.comparison.pair import Pair
from parity.comparison.phases import Location
from parity.comparison.tolerance import Bound, CheckedPair
from parity.faults.results import sources
from trainspec.trace import Trace

Record = dict[str, Any]
Main = Callable[..., int]
OTHER_CODE = "f" * 64
Q0 = Q1.replace("layers.1", "layers.0")
RESULT: Record = {
    "verdict": "pass",
    "first": None,
    "used": {"loss": 0.25},
    "undetermined": 0.0,
    "unproven": 1,
    "examined": 50,
    "times_30": {"loss": 7.5},
    "control_passes": [],
    "hidden": [],
}


@pytest.fixture
def checked() -> list[str]:
    """The cases that were checked."""
    return []


@pytest.fixture
def main(tmp_path: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    """The benchmark without its checks: every case passes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = import_module("false_alarms")

    def check(groups: Sequence[Sequence[Any]], *_: object) -> Iterator[Record]:
        for case in (case for group in groups for case in group):
            checked.append(str(case))
            used = {"loss": len(checked) / 100}
            yield {"name": str(case), "case": vars(case), **RESULT, "used": used}

    monkeypatch.setattr(script, "checked", check)

    def run(*words: str) -> int:
        shape = ("--groups", "1", "--each", "3", "--out", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["false_alarms.py", *shape, *words])
        return script.main()

    return run


def records(directory: Path) -> list[Record]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def rewrite(directory: Path, **changes: object) -> None:
    lines = [json.dumps(record | changes) for record in records(directory)]
    (directory / "results.jsonl").write_text("\n".join([*lines, ""]))


def test_a_case_is_run_once_by_the_same_code_with_as_many_updates(
    main: Main, tmp_path: Path, checked: list[str]
):
    assert main("--seed", "3") == 0
    assert len(checked) == 3
    assert {(r["sources"], r["updates"], r["drawn_by"]) for r in records(tmp_path)} == {(sources(), 2, 3)}
    assert main("--seed", "3") == 0
    assert len(checked) == 3
    rewrite(tmp_path, updates=3)
    assert main("--seed", "3") == 0
    assert len(checked) == 6
    rewrite(tmp_path, sources=OTHER_CODE)
    assert main("--seed", "3") == 0
    assert checked[:3] == checked[3:6] == checked[6:]
    assert len(records(tmp_path)) == 9


def test_a_seed_has_one_purpose_in_every_precision_and_code(main: Main, tmp_path: Path, capsys):
    assert main("--seed", "3", "--purpose", "find", "--precision", "bf16") == 0
    rewrite(tmp_path, sources=OTHER_CODE)
    before = records(tmp_path)
    capsys.readouterr()
    assert main("--seed", "3", "--purpose", "test") == 2
    assert "choose another seed" in capsys.readouterr().err
    assert records(tmp_path) == before
    assert main("--seed", "3", "--purpose", "find") == 0
    assert main("--seed", "4", "--purpose", "test") == 0


def test_the_page_keeps_codes_apart(main: Main, tmp_path: Path, capsys):
    page, now = tmp_path / "page.md", sources()[:8]
    assert main("--seed", "3", "--purpose", "find") == 0
    rewrite(tmp_path, sources=OTHER_CODE, verdict="fail", first="step 1, loss: 2 of the bound")
    assert main("--seed", "4") == 0
    rewritten = records(tmp_path)
    rewrite(tmp_path, sources=OTHER_CODE)
    assert main("--page", str(page)) == 2
    assert "no tests of this code" in capsys.readouterr().err
    assert not page.exists()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rewritten))
    assert main("--page", str(page)) == 0
    text = page.read_text()
    assert "| `ffffffff` | find | fp32 | 2 | 3 | 3 | 3 | 0 | 2.0% | 0 |" in text
    assert f"| `{now}` | test | fp32 | 2 | 4 | 3 | 0 | 0 | 2.0% | 0 |" in text
    assert f"made to test with `{now}`" in text
    assert text.count("- `ffffffff`, fp32, made to find: ") == 3
    # The largest share of this code's tests, which are the fourth to the sixth case.
    assert "| loss | 0.06 | – | 7.5 | – |" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drawn_by": 4}, "seed 4 was run both to find and to test"),
        ({"purpose": None}, "no tests of this code"),
    ],
)
def test_records_that_were_put_together_are_checked(
    main: Main, tmp_path: Path, capsys, change: Record, said: str
):
    assert main("--seed", "3", "--purpose", "find") == 0
    found = [record | change for record in records(tmp_path)]
    (tmp_path / "results.jsonl").unlink()
    if "drawn_by" in change:
        assert main("--seed", "4") == 0
    with (tmp_path / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in found)
    capsys.readouterr()
    assert main("--page", str(tmp_path / "page.md")) == 2
    assert said in capsys.readouterr().err


def test_no_cases_are_refused(main: Main, tmp_path: Path, capsys):
    for words in (("--groups", "0"), ("--each", "0")):
        assert main(*words) == 2
        assert capsys.readouterr().err == "false_alarms: --groups and --each: at least 1\n"
    assert not (tmp_path / "results.jsonl").exists()


def test_a_record_without_its_code_is_refused(main: Main, tmp_path: Path, capsys):
    assert main("--seed", "3") == 0
    old = [{k: v for k, v in record.items() if k != "sources"} for record in records(tmp_path)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    capsys.readouterr()
    for words in (("--seed", "3"), ("--page", str(tmp_path / "page.md"))):
        assert main(*words) == 2
        said = capsys.readouterr().err
        assert "results.jsonl:1: the record has no sources" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(("noisy", "said"), [((Q1,), []), ((Q0, Q1), [Q1.replace("layers.1", "layers.*")])])
def test_a_mistake_is_hidden_only_where_no_layer_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: tuple[str, ...], said: list[str]
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = import_module("false_alarms")
    left, right = (Trace(write(Sim(steps=1), tmp_path / side)) for side in ("a", "b"))

    def checked_pairs(location: Location, left: np.ndarray, right: np.ndarray) -> list[CheckedPair]:
        size = 1.0 if location.phase == "gradient" and location.tensor in noisy else 1e-6 * np.abs(left).max()
        return [CheckedPair(left, right, Bound(np.full(left.shape, size)))]

    bounds = SimpleNamespace(notes=(), incomparable=lambda *_: None, checked_pairs=checked_pairs)
    sides = SimpleNamespace(trace=left), SimpleNamespace(trace=right)
    runs = SimpleNamespace(results=sides, bounds=lambda _: bounds)
    comparison = compare(Pair(left, right), bounds)
    assert {finding.location.tensor for finding in comparison.unproven} == set(noisy)
    assert script.hidden(runs, comparison) == said
