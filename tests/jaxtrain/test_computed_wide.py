"""Functions computed in the accumulation type: what they round, what they keep, and that float64 is left alone."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from launch import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    (out,) = launch("kept_arrays.py", {}, tmp_path_factory.mktemp("kept"))
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("dtype", "function", "arguments"),
    [("bfloat16", "swiglu", 2), ("bfloat16", "norm", 1), ("float32", "swiglu", 2), ("float32", "norm", 1)],
)
def test_only_the_arguments_are_kept(found: dict[str, Any], dtype: str, function: str, arguments: int):
    assert found[f"{dtype} {function}"]["kept"] == [dtype] * arguments


@pytest.mark.parametrize("function", ["swiglu", "norm"])
def test_autodiff_alone_keeps_wider_arrays(found: dict[str, Any], function: str):
    assert "float32" in found[f"bfloat16 {function} by autodiff"]["kept"]
    assert len(found["float32 swiglu by autodiff"]["kept"]) > 2


@pytest.mark.parametrize("function", ["swiglu", "rotate", "norm"])
def test_float64_runs_the_function_itself(found: dict[str, Any], function: str):
    for dtype, is_itself in (("float64", True), ("float32", False)):
        programs = (found[f"{dtype} {function}{end}"]["program"] for end in ("", " step by step"))
        assert (next(programs) == next(programs)) is is_itself


@pytest.mark.parametrize("function", ["swiglu", "rotate", "norm"])
def test_a_result_is_rounded_once(found: dict[str, Any], function: str):
    """In bfloat16 a result is that of float64, rounded; but for what float32 moves over the edge between two."""
    results = 2 * 16 * 4 * 8
    assert found[f"bfloat16 {function}"]["off"] <= results // 500
    assert found[f"bfloat16 {function} step by step"]["off"] > results // 10


@pytest.mark.parametrize("name", ["product", "sums"])
def test_a_cpu_multiplies_bfloat16_where_it_has_instructions_for_that(found: dict[str, Any], name: str):
    programs = {
        kind: re.findall(
            r"dot_general.*: \((.*)\) -> (.*)", found["bfloat16 products"][f"{name} {kind} program"]
        )
        for kind in ("with instructions", "without instructions")
    }
    for kind, factors in (("with instructions", "xbf16>"), ("without instructions", "xf32>")):
        [(taken, given)] = programs[kind]
        assert taken.count(factors) == 2, kind
        assert "xf32>" in given, kind
    # Factors of 16 bits make products without rounding, so that only the order of the sums is another.
    results = [np.array(found["bfloat16 products"][f"{name} {kind}"]) for kind in programs]
    assert np.max(np.abs(results[0] - results[1])) <= 2**-7 * np.max(np.abs(results[0]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_types_are_multiplied_as_they_are(found: dict[str, Any], dtype: str):
    products = found[f"{dtype} products"]
    assert products["product with instructions program"] == products["product without instructions program"]
    assert "convert" not in products["product with instructions program"]
