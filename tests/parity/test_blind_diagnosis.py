"""The blind reading of diagnoses: what is drawn, what a reader sees, and how it is scored."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from small import ROOT

from parity.diagnosis.causes import CAUSES
from parity.faults import FAULTS
from parity.faults.results import sources


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BLIND = script("blind_diagnosis")


def test_a_draw_is_of_the_seed_and_of_faults_that_can_be_seen():
    first, again, other = (BLIND.draw(seed, 20, "fp64") for seed in (1, 1, 2))
    assert first == again != other
    assert len({fault.name for fault, _ in first}) == 20
    assert all(fault.where and backend in fault.edits for fault, backend in first)
    assert all("bf16" not in fault.below_bound_in for fault, _ in BLIND.draw(1, 999, "bf16"))


def test_every_cause_has_its_item_of_the_contract():
    every = BLIND.items()
    lines = (ROOT / "docs/numerics.md").read_text().splitlines()
    for cause in CAUSES.values():
        item = BLIND.item_of(cause.contract, every)
        assert cause.contract.words in " ".join(" ".join(lines[i - 1] for i in item.lines).split())


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Results of all faults, each diagnosed rightly but one, which names a cause of another line, and one without a cause."""
    entries, every = [], BLIND.items()
    for number, (fault, backend) in enumerate(BLIND.draw(5, 20, "fp64")):
        assert fault.cause
        lines = {name: BLIND.item_of(cause.contract, every).lines for name, cause in CAUSES.items()}
        other = next(name for name in CAUSES if lines[name] != lines[fault.cause])
        named = [] if number == 0 else [other] if number == 1 else [fault.cause]
        said = [f"diagnosis: {named[0]}" if named else "diagnosis: no known cause fits well"]
        entries.append(
            {
                "fault": fault.name, "backend": backend, "precision": "fp64", "said": "step 1, somewhere",
                "report": said, "diagnosis": {"alike": named},
            }
        )  # fmt: skip
    (tmp_path / "faults.json").write_text(json.dumps({"sources": sources(), "results": entries}))
    return tmp_path


def test_a_reader_sees_no_name_and_is_scored_by_lines(kept: Path, capsys, monkeypatch):
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["blind_diagnosis.py", *words])
        return BLIND.main()

    out = kept / "out"
    assert run("--seed", "5", "--from", str(kept), "--out", str(out)) == 0
    cases = (out / "cases.txt").read_text()
    assert cases.count("case ") == 20
    assert not [fault.name for fault in FAULTS if f" {fault.name}" in cases and fault.name not in CAUSES]
    assert run("--score", str(out)) == 0
    assert "18 of 20 diagnoses lead to the right line" in capsys.readouterr().out
    every, key = BLIND.items(), json.loads((out / "key.json").read_text())
    right = [BLIND.item_of(CAUSES[case["cause"]].contract, every).lines[0] for case in key]
    answers = out / "answers.txt"
    answers.write_text("".join(f"{n} {line}\n" for n, line in enumerate(right, 1)))
    assert run("--score", str(out), "--answers", str(answers)) == 0
    assert "20 of 20 answers" in capsys.readouterr().out
    answers.write_text("".join(f"{n} 1\n" for n in range(1, 21)))
    assert run("--score", str(out), "--answers", str(answers)) == 1


def test_what_cannot_be_drawn_is_refused_in_one_line(kept: Path, capsys, monkeypatch):
    def said(*words: str) -> str:
        argv = ["blind_diagnosis.py", "--from", str(kept), "--out", str(kept / "out"), *words]
        monkeypatch.setattr(sys, "argv", argv)
        assert BLIND.main() == 2
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.count("\n") == 1
        return shown.err

    assert "no result of " in said("--seed", "6")
    assert "--count 0: draw at least 1" in said("--seed", "5", "--count", "0")
    stored = json.loads((kept / "faults.json").read_text())
    (kept / "faults.json").write_text(json.dumps(stored | {"sources": stored["sources"][::-1]}))
    assert "of other code than this" in said("--seed", "5")
    (kept / "faults.json").unlink()
    assert "missing" in said("--seed", "5")
    assert not (kept / "out/cases.txt").exists()
