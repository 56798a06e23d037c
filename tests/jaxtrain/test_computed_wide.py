"""Functions computed in the accumulation type: what they round, what they keep, and that float64 is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    (out,) = launch("kept_arrays.py", {}, tmp_path_factory.mktemp("kept"))
    return json.loads(out.read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("function", "arguments"), [("swiglu", 2), ("norm", 1)])
def test_only_the_arguments_are_kept(found: dict[str, Any], dtype: str, function: str, arguments: int):
    assert found[f"{dtype} {function}"]["kept"] == [dtype] * arguments
    # What autodiff alone keeps.
    assert len(found[f"{dtype} {function} undecorated"]["kept"]) > arguments


@pytest.mark.parametrize("function", ["swiglu", "rotate", "norm"])
def test_float64_runs_the_function_itself(found: dict[str, Any], function: str):
    for dtype, is_itself in (("float64", True), ("float32", False)):
        programs = (found[f"{dtype} {function}{end}"]["program"] for end in ("", " undecorated"))
        assert (next(programs) == next(programs)) is is_itself


@pytest.mark.parametrize("function", ["swiglu", "rotate", "norm"])
def test_a_result_is_rounded_once(found: dict[str, Any], function: str):
    """In bfloat16 a result is that of float64, rounded; but for what float32 moves over the edge between two."""
    results = 2 * 16 * 4 * 8
    assert found[f"bfloat16 {function}"]["off"] <= results // 500
    assert found[f"bfloat16 {function} undecorated"]["off"] > results // 10
