"""What a user may give in place of a file of records: one line that says what, where, and the way out."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many import ended

from trainspec.cli import main
from trainspec.recipe import Recipe

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "conversations": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "completion": {"prompt": "Why?", "completion": " So."},
    "instruction": {"instruction": "Why?", "input": "it", "output": "So."},
    "text": {"text": "So it is."},
}

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def data(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Run:
    """How `trainspec data` ends for a source, with settings on top of a small recipe."""

    def run(source: Path, *settings: str) -> dict[str, Any]:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(make_recipe(data={"train": str(source)}).to_yaml())
        words = [word for setting in settings for word in ("--set", setting)]
        return ended(main, ["data", str(recipe), "--rows", "1", *words])

    return run


def refused(found: dict[str, Any], message: str) -> None:
    assert found["code"] == 2, found
    [line] = found["err"].splitlines()
    assert message in line


def written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_are_read_however_an_editor_saved_them(data: Run, tmp_path: Path, shape: str):
    task = ["data.task=text"] * (shape == "text")
    lines = [json.dumps(SHAPES[shape])] * 5
    forms: dict[str, bytes] = {
        "as they are": "\n".join(lines).encode(),
        "BOM": codecs.BOM_UTF8 + "\n".join(lines).encode(),
        "CRLF": "\r\n".join([*lines, ""]).encode(),
        "empty lines": "\n\n \n".join([*lines, ""]).encode(),
    }
    shown = {}
    for form, content in forms.items():
        found = data(written(tmp_path / "d.jsonl", content), *task)
        assert found["code"] == 0, (form, found)
        shown[form] = found["out"]
    assert "5 records make" in shown["as they are"]
    assert len(set(shown.values())) == 1, shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl: has no record; give one in each line, or name another file"),
        ("d.jsonl", codecs.BOM_UTF8 + b"\n \n", "d.jsonl: has no record"),
        ("d.json", "[]", "d.json: has no record"),
        ("d.csv", "instruction,output\n", "d.csv: has no record"),
        ("d.jsonl", json.dumps([SHAPES["instruction"]]), "d.jsonl: a JSON array, not a record in each line; name it .json"),
        ("d.jsonl", json.dumps([SHAPES["instruction"]], indent=1), "d.jsonl: a JSON array, not a record in each line; name it .json"),
        ("d.jsonl", "[1]\n", "d.jsonl line 1: a record is a JSON object, not a list"),
        ("d.jsonl", json.dumps(SHAPES["instruction"]).encode("utf-16"), "d.jsonl: UTF-16 text; save it as UTF-8"),
        ("d.json", b'[{"instruction": "caf\xe9"}]', "d.json: not UTF-8 text (invalid continuation byte at byte 21); save it as UTF-8"),
        ("d.csv", "instruction;output\na;b\n", "one column, 'instruction;output'; cells are separated by ',', not by ';'\n"),
        ("d.csv", "instruction\toutput\na\tb\n", "cells are separated by ',', not by '\\t'; name it .tsv\n"),
        ("d.tsv", "instruction,output\na,b\n", "cells are separated by '\\t', not by ','; name it .csv\n"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_records_is_told_as_what_it_is(
    data: Run, tmp_path: Path, name: str, content: str | bytes, message: str
):
    found = data(written(tmp_path / name, content))
    refused(found, message.rstrip("\n"))
    assert not message.endswith("\n") or found["err"].endswith(message)


def test_a_plain_text_in_another_encoding_names_the_way_out(data: Run, tmp_path: Path):
    told = data(written(tmp_path / "d.txt", b"a\n\ncaf\xe9\n"), "data.task=text")
    refused(
        told,
        "d.txt line 3: not UTF-8 text (invalid continuation byte at byte 3 of the line); save it as UTF-8",
    )
    refused(
        data(written(tmp_path / "d.txt", "a".encode("utf-16")), "data.task=text"), "d.txt: UTF-16 text; save"
    )


def test_a_directory_names_the_files_in_it(data: Run, tmp_path: Path):
    folder = tmp_path / "records.jsonl"
    folder.mkdir()
    refused(data(folder), f"{folder}: a directory that `datasets` did not save; name a file (.jsonl, .json,")
    written(folder / "b.jsonl", "")
    written(folder / "a.jsonl", json.dumps(SHAPES["instruction"]))
    written(folder / "README.md", "")
    refused(data(folder), f"did not save; name a file in it, such as {folder}/a.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messagess": TURNS}, "among 'messagess'; say which is which, such as data.columns={messages: messagess}"),
        ({"prompt": "a", "completions": "b"}, "'prompt' without 'completion' among 'prompt', 'completions'; say which is which, such as data.columns={completion: completions}"),
        ({"prompt": "a", "response": "b"}, "data.columns={completion: response}"),
        ({"prompt": "a", "chosen": "b"}, "data.columns={completion: YOUR_FIELD}"),
        ({"question": "a", "context": "c", "answers": {"text": ["b"], "answer_start": [1]}}, "data.columns={instruction: question, references: answers}"),
        ({"prompt": TURNS[:1], "completion": 7}, "'prompt' is a list and 'completion' a number; give two texts, or two lists of messages"),
        ({"prompt": "a", "completion": TURNS[1:]}, "'prompt' is text and 'completion' a list; give two texts, or two lists of messages"),
        # No field of ours that the record has already is what another one was meant for.
        ({"instruction": "a", "output": "b", "outputs": "c"}, "field 'outputs' is not used beside 'instruction'; known here: choices,"),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "field 'inputs' is not used beside 'instruction'; did you mean 'input'?"),
    ],
)  # fmt: skip
def test_a_field_of_another_name_is_told_with_the_one_that_is_meant(
    data: Run, tmp_path: Path, record: dict[str, Any], message: str
):
    refused(data(written(tmp_path / "d.jsonl", json.dumps(record))), message)


@pytest.mark.parametrize(
    ("task", "meant"),
    [
        ("translate", "; did you mean 'translation'?"),
        ("Translation", "; did you mean 'translation'?"),
        ("x", ""),
    ],
)
def test_a_task_that_is_none_is_told_with_the_nearest(data: Run, tmp_path: Path, task: str, meant: str):
    found = data(written(tmp_path / "d.jsonl", json.dumps(SHAPES["instruction"])), f"data.task={task}")
    refused(found, "data.task: input should be 'question_answering', 'summarisation', 'translation',")
    assert found["err"].endswith(f", not '{task}'{meant}\n")
