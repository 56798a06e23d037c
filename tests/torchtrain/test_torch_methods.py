"""Every method under every kind of plan is the run of one process, and leaves the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_cases import case, Case
from plan_runs import Make, check, run_cases, traces

METHODS = ("adapter", "prompt", "ptuning-mlp", "ptuning-lstm", "prefix", "prefix-projection")
SHARDS = ("optimizer", "gradients", "params")
CASES = [
    *(case("tied", m, "fp64", **p) for m in METHODS for p in ({"data": 2}, {"tensor": 2})),
    *(
        case("wide", m, "fp32", **p)
        for m in METHODS
        for p in ({"data": 2}, {"tensor": 2}, *({"fsdp": 2, "shards": s} for s in SHARDS))
    ),
    *(case("wide", m, "fp32", packing=True, fsdp=2, shards="params", remat="full") for m in METHODS),
    *(case("wide", m, r, fsdp=2, shards=s) for m in METHODS for r in ("bf16", "bf16-bf16") for s in SHARDS),
    *(case("tied", m, "bf16", tensor=2) for m in METHODS),
]
PIPES = [
    *(case("deep-tied", m, "fp32", pipe=2, microbatches=4) for m in (*METHODS, "lora-first")),
    *(case("deep-tied", m, "fp32", packing=True, pipe=2, microbatches=3, remat="full") for m in METHODS),
    *(
        case("wide", m, r, pipe=2, microbatches=4)
        for m in (*METHODS, "lora-first")
        for r in ("bf16", "bf16-bf16")
    ),
]
MORE = [
    *(case("tied", m, "fp64", data=2, tensor=2, remat="full", packing=True) for m in METHODS),
    *(case("wide", m, "fp32", fsdp=2, tensor=2, shards=s) for m in METHODS for s in SHARDS),
    *(case("deep", m, "fp32", pipe=2, fsdp=2, shards="optimizer", microbatches=3) for m in (*METHODS, "lora-first")),
    *(case("deep", m, r, pipe=2, tensor=2, microbatches=3, remat="full") for m in METHODS for r in ("fp32", "bf16")),
    *(case("deep", m, "fp32", pipe=4, microbatches=2) for m in METHODS),
    *(case("deep", m, r, pipe=2, fsdp=2, tensor=2, shards="optimizer", microbatches=3) for m in METHODS for r in ("fp32", "bf16")),
]  # fmt: skip


@pytest.fixture(scope="module")
def two(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("two"), CASES, [], [])


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two(two: Path, case: Case):
    check(*traces(two, case), case.precision)


@pytest.fixture(scope="module")
def pipes(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("pipes"), PIPES, [], [])


@pytest.mark.full
@pytest.mark.parametrize("case", PIPES, ids=str)
def test_pipes(pipes: Path, case: Case):
    check(*traces(pipes, case), case.precision)


@pytest.fixture(scope="module")
def more(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("more"), MORE, [], [])


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more(more: Path, case: Case):
    check(*traces(more, case), case.precision)
