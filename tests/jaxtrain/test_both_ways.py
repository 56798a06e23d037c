"""An update in one program is that in two, bit by bit, and moves no more, under plans of several devices."""

import json
from pathlib import Path

import pytest
from launch import launch

BF16 = {"policy": "bf16", "reduce": "fp32"}
COMMON = {
    "method": {"kind": "full"},
    "data": {"sequence_tokens": 48, "too_long": "cut"},
    "batch": {"global_examples": 8, "accumulation": 2},
    "optimizer": {"clip_norm": 0.05},
}
CASES = {
    "params": COMMON | {"precision": BF16, "plan": {"fsdp": 2, "tensor": 2, "shards": "params"}},
    "optimizer": COMMON | {"precision": BF16, "plan": {"data": 2, "fsdp": 2, "shards": "optimizer"}},
    "gradients": COMMON | {"plan": {"data": 2, "fsdp": 2, "shards": "gradients"}},
    "pipe": COMMON | {"plan": {"pipe": 2, "data": 2, "microbatches": 2}},
}


@pytest.fixture(autouse=True)
def _as_users_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused loops as by default: the older way contracts sums and products differently in one program and in two."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")


def check(scratch: Path, *names: str) -> None:
    (out,) = launch("both_ways.py", {name: CASES[name] for name in names}, scratch)
    for name, found in json.loads(out.read_text()).items():
        assert found["arrays"] > 20
        assert found["differing"] == [], name
        one, two = found["sent"]
        assert one <= two, name


@pytest.mark.full
def test_one_program_is_two_where_weights_are_split(tmp_path: Path):
    check(tmp_path, "params")


@pytest.mark.full
def test_one_program_is_two_under_other_plans(tmp_path: Path):
    check(tmp_path, "optimizer", "gradients", "pipe")
