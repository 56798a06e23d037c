"""Every kernel of attention is the reference, in its result and all gradients, and keeps no scores."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from launch import Runs, launch, worst
from test_plans import COMMON, FULL, LORA, ROUNDING

# Rounding alone, relative to the largest entry: of float64, and of a few dozen float32 operations in a row.
BOUND = {"float64": 1e-12, "float32": 1e-5}
BLOCKS = {
    "packed-gqa": {},
    "left-window-prefix-odd": {
        "rows": "left",
        "tokens": 700,
        "window": 200,
        "prefix": 3,
        "heads": 2,
        "kv_heads": 1,
    },
    "packed-prompt-window": {"tokens": 130, "prompt": 3, "window": 20, "kv_heads": 4},
}
MORE_BLOCKS = {
    "prefix-without-positions": {"tokens": 150, "prefix": 3, "window": 20, "prefix_has_positions": False},
    "right-one-kv-head": {"rows": "right", "tokens": 129, "kv_heads": 1},
    "whole-one-block": {"rows": "whole", "tokens": 128},
    "one-token-blocks": {"tokens": 257, "prefix": 1},
    "split": {"split": True, "prefix": 2},
}
# Of queries and keys one or both are odd.
CUDNN = {
    "packed-odd": {"tokens": 41},
    "odd-queries": {"rows": "left", "tokens": 41, "prefix": 3, "window": 20},
    "odd-causal": {"rows": "right", "tokens": 41, "reads_padding": False},
    "odd-keys": {"tokens": 40, "prefix": 3, "prefix_has_positions": False, "window": 2},
}
SPLASH = {"packed-prefix": {"tokens": 140, "prefix": 3}}
MORE_SPLASH = {
    "packed-gqa": {},
    "left": {"rows": "left", "tokens": 128, "kv_heads": 4},
    "right-one-kv-head-prefix": {"rows": "right", "tokens": 130, "kv_heads": 1, "prefix": 5},
    "whole-window": {"rows": "whole", "tokens": 200, "window": 20, "reads_padding": False},
    "packed-prompt-window": {"tokens": 140, "prompt": 3, "window": 20, "reads_padding": False},
    "prefix-window": {"tokens": 140, "prefix": 3, "window": 20, "reads_padding": False},
    "window-recorded": {"tokens": 140, "window": 20},
    "split": {"split": True, "prefix": 2},
}
# What a kernel is told that is not so: the controls.
WRONG = {
    "window": {"window": 20, "wrong": {"window": 21}},
    "prefix-positions": {"window": 20, "prefix": 3, "wrong": {"prefix_has_positions": False}},
}
CHOSEN = {
    ("auto", "fp64", "cpu", 64, ""): "reference",
    ("fused", "fp64", "cpu", 64, ""): "blocks",
    ("auto", "fp32", "cpu", 64, ""): "blocks",
    ("reference", "bf16", "gpu", 128, "9.0"): "reference",
    ("auto", "bf16", "gpu", 128, "8.0"): "cudnn",
    ("fused", "bf16", "gpu", 256, "9.0"): "cudnn",
    ("fused", "bf16", "gpu", 256, "8.0"): "blocks",
    ("auto", "bf16", "gpu", 12, "9.0"): "blocks",
    ("auto", "fp32", "gpu", 128, "9.0"): "blocks",
    ("auto", "bf16", "tpu", 128, ""): "splash",
    ("auto", "fp32", "tpu", 64, ""): "splash",
    ("fused", "fp64", "tpu", 64, ""): "blocks",
}
Errors = dict[str, dict[str, float]]


def errors_of(cases: dict[str, dict[str, Any]], scratch: Path) -> Errors:
    return json.loads(launch("compute_attention.py", cases, scratch)[0].read_text())


def named(kernel: str, dtype: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{kernel}-{name}": {"kernel": kernel, "dtype": dtype} | case for name, case in cases.items()}


def assert_within(errors: Errors, dtype: str) -> None:
    for name, of_arrays in errors.items():
        assert max(of_arrays.values()) <= BOUND[dtype], (name, of_arrays)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    cases = named("blocks", "float64", BLOCKS | WRONG) | named("splash", "float32", SPLASH)
    cases |= named("cudnn", "float32", CUDNN)
    return errors_of(cases, tmp_path_factory.mktemp("attention"))


def test_blocks_are_the_reference_in_float64(errors: Errors):
    assert_within({name: errors[f"blocks-{name}"] for name in BLOCKS}, "float64")


def test_cudnns_odd_lengths_are_the_reference_in_float32(errors: Errors):
    """The operands and the mask that cuDNN is given, computed by XLA."""
    assert_within({name: errors[f"cudnn-{name}"] for name in CUDNN}, "float32")


def test_splash_is_the_reference_in_float32(errors: Errors):
    assert_within({name: errors[f"splash-{name}"] for name in SPLASH}, "float32")


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_told_something_else_shows(errors: Errors, name: str):
    assert min(errors[f"blocks-{name}"].values()) > 1e-4


@pytest.mark.full
def test_every_other_case(tmp_path: Path):
    """Also split over two stages, two devices of a batch and two of heads, in one program of all."""
    found = errors_of(
        named("blocks", "float64", MORE_BLOCKS) | named("splash", "float32", MORE_SPLASH), tmp_path
    )
    assert_within({name: of_arrays for name, of_arrays in found.items() if "blocks" in name}, "float64")
    assert_within({name: of_arrays for name, of_arrays in found.items() if "splash" in name}, "float32")


def inspected(lengths: list[int], step_lengths: list[int], scratch: Path) -> dict[str, Any]:
    cases = {
        "chosen": {" ".join(map(str, facts)): facts for facts in CHOSEN},
        "lengths": lengths,
        "step_lengths": step_lengths,
    }
    return json.loads(launch("inspect_attention.py", cases, scratch, devices=1)[0].read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return inspected([512, 2048], [], tmp_path_factory.mktemp("inspected"))


def test_a_site_has_the_kernel_that_it_can_run(found: dict[str, Any]):
    assert found["chosen"] == {" ".join(map(str, facts)): kernel for facts, kernel in CHOSEN.items()}


def test_on_a_gpu_the_program_is_cudnns_calls_and_no_product(found: dict[str, Any]):
    masked, causal = ([found["gpu"][f"{name}{odd}"] for odd in ("", "-odd")] for name in ("masked", "causal"))
    reference = found["gpu"]["reference"]
    for program in masked + causal:
        assert len(program["calls"]) == 2
        assert [call.endswith("Backward") for call in program["calls"]] == [False, True]
        assert program["products"] == 0
    # Only rows of several documents have a mask.
    assert all(program["has_mask"] for program in masked)
    assert not any(program["has_mask"] for program in causal)
    assert (reference["calls"], reference["has_mask"]) == ([], True)
    assert reference["products"] >= 6


def test_the_memory_of_attention_grows_with_the_row(found: dict[str, Any]):
    fused, reference = (found["bytes"][name] for name in ("blocks", "reference"))
    assert fused[1] <= 4.4 * fused[0]
    assert reference[1] > 12 * reference[0]  # control


@pytest.mark.full
def test_the_memory_of_an_update_does_not_grow_with_the_square_of_the_row(tmp_path: Path):
    """Twice as long, 2.2 to 3 times the memory: 16 times for 8 times the row, where the reference takes 58 (see 0025)."""
    found = inspected([512], [512, 1024, 2048, 4096], tmp_path)["step_bytes"]
    assert all(long <= 3.1 * short for short, long in pairwise(found["fused"])), found
    assert found["fused"][3] <= 17 * found["fused"][0]
    assert all(long > 3.5 * short for short, long in pairwise(found["reference"]))  # control


@pytest.mark.full(minutes=2)
def test_a_model_with_fused_attention_trains_as_with_the_reference(tmp_path: Path):
    """Packed rows through stages, tensor and recomputation; a prefix, of a model with a window, and a prompt."""
    prefix, prompt = ({"kind": kind, "virtual_tokens": 3} for kind in ("prefix", "prompt"))
    data = COMMON["data"] | {"sequence_tokens": 200}
    split = {"pipe": 2, "microbatches": 2, "data": 2, "tensor": 2, "remat": "full"}
    models: dict[str, dict[str, Any]] = {
        "full": {"method": FULL, "data": data},
        "split": {"method": LORA, "data": data, "batch": {"global_examples": 16, "accumulation": 1}},
        "prefix": {"method": prefix, "variant": "mistral"},
        "prompt": {
            "method": prompt,
            "variant": "mistral",
            "data": data | {"packing": False, "padding_side": "left"},
        },
    }
    cases = {}
    for name, model in models.items():
        plan = split if name == "split" else {}
        for attention in ("reference", "fused"):
            cases[f"{name}-{attention}"] = COMMON | model | {"plan": plan | {"attention": attention}}
    runs = Runs(launch("run_plans.py", cases, tmp_path)[0])
    for name in models:
        for kind, difference in worst(runs.of(f"{name}-fused"), runs.of(f"{name}-reference")).items():
            assert difference <= ROUNDING, (name, kind, difference)
