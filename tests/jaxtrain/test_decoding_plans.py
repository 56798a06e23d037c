"""Under every plan a cache gives the logits of whole rows; it is sharded, and compiled once."""

import numpy as np
import pytest
from launch import Runs, launch
from test_plans import FP64, FULL, LORA

DORA = {"kind": "dora", "rank": 2, "alpha": 4, "targets": ["q_proj", "o_proj"]}
PREFIX = {"kind": "prefix", "virtual_tokens": 3}
PROMPT = {"kind": "prompt", "virtual_tokens": 3}
FSDP = {"fsdp": 4, "shards": "params"}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2, "shards": "params"}
# The plan, and the rows and kv heads (of 4 and 4) that a device keeps.
CASES = {
    "one": ({"variant": "smollm3", "method": LORA}, (4, 4)),
    "stacked": ({"variant": "smollm3", "method": LORA, "stacked": True}, (4, 4)),
    "fsdp": ({"variant": "mistral", "method": LORA, "plan": FSDP}, (1, 4)),
    "tensor": ({"variant": "glm", "method": PREFIX, "plan": {"tensor": 2}}, (4, 2)),
    "data-tensor": ({"variant": "qwen3", "method": FULL, "plan": {"data": 2, "tensor": 2}}, (2, 2)),
    "mixed": ({"method": PROMPT, "plan": MIXED}, (1, 2)),
    "mixed-stacked": ({"method": LORA, "plan": MIXED, "stacked": True}, (1, 2)),
    "dora-stacked": ({"variant": "smollm3", "method": DORA, "stacked": True}, (4, 4)),
    "mixed-dora": ({"method": DORA, "plan": MIXED}, (1, 2)),
    "fp32": ({"method": LORA, "plan": MIXED, "precision": {"policy": "fp32"}}, (1, 2)),
    "bf16": ({"method": LORA, "precision": {"policy": "bf16"}}, (4, 4)),
}
ROUNDING = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 0.02}


def difference(run: dict[str, np.ndarray]) -> float:
    """The largest difference of logits, relative to the largest of them, of the rows that go on."""
    going = [0, 2, 3]
    cached, whole = run["cached"][:, going], run["whole"][:, going]
    return float(np.abs(cached - whole).max() / np.abs(whole).max())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    cases = {name: {"precision": FP64} | case for name, (case, _) in CASES.items()}
    cases["late"] = cases["one"] | {"late": True}
    cases |= {f"factors of {name}": cases[name] | {"factors": True} for name in ("one", "stacked")}
    return Runs(launch("run_decoding.py", cases, tmp_path_factory.mktemp("decoding"))[0])


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("name", CASES)
def test_a_cache_under_a_plan_gives_the_logits_of_whole_rows(runs, name):
    case, kept = CASES[name]
    run = runs.of(name)
    policy = case.get("precision", FP64)["policy"]
    assert difference(run) < ROUNDING[policy]
    assert policy == "fp64" or difference(run) > 0.0
    rows, heads, _, _ = run["shard"][-4:]
    assert (rows, heads) == kept
    first, second, of_another_length = run["compiled"]
    assert not second.any()
    assert not any(batch[2:].any() for batch in (first, of_another_length))  # no token after the first one
    assert min(*first[:2], *of_another_length[:2]) > 0  # the control: what is compiled is counted


@pytest.mark.full
def test_a_token_at_another_place_would_show(runs):
    """The negative control: every token one place late."""
    assert difference(runs.of("late")) > 1e-3


@pytest.mark.full
def test_a_cpu_multiplies_with_weights_as_left_factors(runs):
    made = runs.of("factors of one")["products"]
    assert len(made) > 14
    assert set(made[:, 1]) == {4}  # rows
    assert 4 in runs.of("factors of stacked")["products"][:, 0]  # control


@pytest.mark.full
def test_two_processes_decode_as_one(tmp_path):
    case = {"precision": FP64, "method": LORA, "plan": {"fsdp": 2, "tensor": 2, "shards": "params"}}
    for out in launch("run_decoding.py", {"mixed": case}, tmp_path, processes=2, devices=4):
        assert difference(Runs(out).of("mixed")) < ROUNDING["fp64"]
