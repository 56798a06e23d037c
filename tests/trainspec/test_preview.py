"""`trainspec data`: what is shown of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many import ended

from trainspec.cli import main
from trainspec.recipe import Recipe


@pytest.fixture
def data(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """How `trainspec data` ends for records, and options after it."""

    def run(records: list[dict[str, Any]], *words: str) -> dict[str, Any]:
        file, recipe = tmp_path / "d.jsonl", tmp_path / "r.yaml"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        recipe.write_text(make_recipe(data={"train": str(file), "packing": False}).to_yaml())
        return ended(main, ["data", str(recipe), *words])

    return run


def test_every_example_is_shown_once(data):
    records = [{"instruction": f"What is {word}?", "output": word} for word in ("one", "two", "three")]

    def shown(*words: str) -> list[str]:
        found = data(records, *words)
        assert found["code"] == 0, found
        return re.findall(r"example \d+: .*\n.*\n +masked '.*What is (\w+)\?", found["out"])

    # Four examples are asked for by default, and three are there.
    assert sorted(shown()) == sorted(shown("--rows", "100")) == ["one", "three", "two"]
    assert len(set(shown("--rows", "2"))) == 2


@pytest.mark.parametrize("rows", ["0", "-3"])
def test_no_example_is_a_mistake(data, rows: str):
    found = data([{"instruction": "Why?", "output": "So."}], "--rows", rows)
    assert (found["code"], found["err"]) == (2, f"trainspec: --rows {rows}: give 1 or more\n")
