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


# Of a product and of the float32 sums over rows: the types of factors and result, and whether the factors are copies in float32.
MULTIPLIED = {
    "product with instructions": ("bf16", "f32", False),
    "product without instructions": ("bf16", "bf16", False),
    "product for a TPU with instructions": ("bf16", "bf16", False),
    "sums with instructions": ("bf16", "f32", False),
    "sums without instructions": ("f32", "f32", True),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_cpu_multiplies_bfloat16_where_it_has_instructions_for_that(found: dict[str, Any], name: str):
    factor, result, are_copies = MULTIPLIED[name]
    program = found["bfloat16 products"][f"{name} program"]
    [(taken, given)] = re.findall(r"dot_general.*: \((.*)\) -> (.*)", program)
    assert (taken.count(f"x{factor}>"), given.count(f"x{result}>")) == (2, 1)
    assert (
        bool(re.search(r"convert .*xbf16>\) -> tensor<.*xf32>", program.partition("dot_general")[0]))
        == are_copies
    )


@pytest.mark.parametrize(("name", "rounding"), [("product", 2**-8), ("sums", 2**-20)])
def test_either_way_gives_the_same_but_for_rounding(found: dict[str, Any], name: str, rounding: float):
    one, other = (
        np.array(found["bfloat16 products"][f"{name} {kind} instructions"]) for kind in ("with", "without")
    )
    assert np.max(np.abs(one - other)) <= 2 * rounding * np.max(np.abs(one))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_types_are_multiplied_as_they_are(found: dict[str, Any], dtype: str):
    products = found[f"{dtype} products"]
    assert products["product with instructions program"] == products["product without instructions program"]
    assert "convert" not in products["product with instructions program"]
