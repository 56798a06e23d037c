"""The data of the tasks: nothing held out is trained on, answers are where they should be, and the script makes these files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import FOLDER
from small import ROOT

from trainspec.recipe import load_recipe
from trainspec.tasks import TASKS

DATA = FOLDER / "data"
RECIPES = {
    "translation": "translation",
    "summarisation": "summarisation",
    "reading_comprehension": "reading-comprehension",
    "question_answering": "question-answering",
}
MADE = ("translation", "summarisation", "reading")
LARGEST_BYTES = 150_000


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_task_has_a_recipe_with_data():
    assert set(RECIPES) == set(TASKS)
    for task, name in RECIPES.items():
        data = load_recipe(FOLDER / f"{name}.yaml").data
        assert data.task == task
        assert data.heldout is not None


@pytest.mark.parametrize("task", TASKS)
def test_nothing_held_out_is_trained_on(task: str):
    data = load_recipe(FOLDER / f"{RECIPES[task]}.yaml").data
    trained = records(ROOT / data.train)
    heldout = records(ROOT / str(data.heldout))
    seen = {record["input"] for record in trained}
    assert not [record for record in heldout if record["input"] in seen]
    assert trained[0]["input"] in seen  # control
    names = {record["input"].split("(")[0].split(":")[0] for record in trained}
    if task != "translation":
        assert not [r for r in heldout if r["input"].split("(")[0].split(":")[0] in names]
    assert len(heldout) >= 40
    assert len(trained) >= 240


def test_a_name_that_is_held_out_is_in_no_list_that_is_trained_on():
    names = {r["input"] for r in records(DATA / "translation-heldout.jsonl") if "," not in r["input"]}
    trained = [r["input"] for r in records(DATA / "translation-train.jsonl")]
    parts = {
        part for text in trained for part in text.replace(", and ", ", ").replace(" and ", ", ").split(", ")
    }
    assert not names & parts


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_stand_where_they_should(split: str):
    for record in records(DATA / f"reading-{split}.jsonl"):
        assert record["references"]
        assert all(answer in record["input"] for answer in record["references"])
    for record in records(DATA / f"summarisation-{split}.jsonl"):
        assert record["output"] not in record["input"]
    for record in records(DATA / f"translation-{split}.jsonl"):
        assert record["input"] != record["output"]
        assert record["output"].strip()


def test_choices_are_four_with_the_answer_at_every_location():
    asked = records(DATA / "choices-heldout.jsonl")
    assert all(len(set(record["choices"])) == 4 for record in asked)
    at = [record["choices"].index(record["output"]) for record in asked]
    assert all(at.count(i) > len(asked) / 8 for i in range(4))
    assert [{k: r[k] for k in r if k != "choices"} for r in asked] == records(DATA / "qa-heldout.jsonl")


def test_files_are_small_and_their_licence_is_beside_them():
    for name in (*(f"{n}-{s}" for n in MADE for s in ("train", "heldout")), "choices-heldout"):
        assert (DATA / f"{name}.jsonl").stat().st_size <= LARGEST_BYTES
        assert f"`{name}.jsonl`" in (DATA / "README.md").read_text(encoding="utf-8")
    for licence in ("LICENSE-PSF.txt", "LICENSE-UNICODE.txt"):
        assert (DATA / licence).is_file()
        assert licence in (DATA / "README.md").read_text(encoding="utf-8")
    assert "Unicode, Inc." in (DATA / "LICENSE-UNICODE.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(
    sys.version_info[:3] != (3, 11, 7), reason="the files are of the docstrings of Python 3.11.7"
)
def test_the_script_makes_these_files(tmp_path: Path):
    subprocess.run([sys.executable, "scripts/make_task_data.py", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 8
    for name in made:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
