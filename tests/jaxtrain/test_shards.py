"""What is saved is what was there, whatever the plan, without a transfer between processes; and it is restored to the last bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from method_sections import sections

FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 4, "alpha": 5.0, "dropout": 0.1, "targets": "all-linear"}
POLICIES = ("fp64", "fp32", "bf16")
COMMON = {"batch": {"global_examples": 16}}
ONE = {"data": 1}
FSDP = {"fsdp": 8, "shards": "params"}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2, "shards": "params"}
PIPE = {"pipe": 2, "microbatches": 2}
INTERLEAVED = PIPE | {"schedule": "interleaved", "chunks": 2}
PLANS = {
    "one": ONE,
    "data": {"data": 8},
    "fsdp": FSDP,
    "fsdp-optimizer": {"fsdp": 8, "shards": "optimizer"},
    "tensor": {"tensor": 4},
    "mixed": MIXED,
    "pipe": PIPE,
    "pipe-mixed": PIPE | {"fsdp": 2, "tensor": 2, "shards": "optimizer"},
    "interleaved": INTERLEAVED,
}
NATIVE = {"format": "native"}
# What a process may hold of its share of the state besides the state itself, and besides one tensor.
MEMORY = 1.2
# Five layers: stages and chunks of unequal length.
UNEVEN = "plain-5"


def precision(policy: str) -> dict[str, str]:
    return {"policy": policy, "reduce": "fp64" if policy == "fp64" else "fp32"}


def found_by(outs: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(out.read_text()) for out in outs]


def assert_saved_once(found: dict[str, Any], name: str) -> None:
    """By one process: every element, once, and as it is."""
    assert found["equal"], name
    assert found["gathered"] == 0, name
    assert found["sizes known"], name
    assert (found["more"], found["once"]) == (0, found["elements"]), name


def test_shards_are_the_state_and_any_plan_takes_it_back(tmp_path):
    """A sample: a pipeline with padding and chunks, tensor and fsdp; bf16 has masters."""
    common = COMMON | {"variant": UNEVEN, "method": LORA, "precision": precision("bf16")}
    cases = {
        "interleaved": common | {"plan": INTERLEAVED, "to": {"one": ONE}},
        "mixed": common | {"plan": MIXED},
        "omits": common | {"omits": "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"},
    }
    [found] = found_by(launch("run_shards.py", cases, tmp_path))
    for name in ("interleaved", "mixed"):
        assert_saved_once(found[name], name)
    assert found["interleaved"]["one"]
    assert not found["interleaved"]["another"]
    assert "no process has written weights of base_model" in found["omits"]["error"]
    assert (found["omits"]["files"], found["omits"]["left"]) == ([], [])


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_saves_every_element_once(tmp_path, policy):
    models = {"tied": FULL, UNEVEN: LORA, "bias": FULL}
    cases = {
        f"{variant}/{name}": COMMON | {"variant": variant, "method": method, "precision": precision(policy), "plan": plan}
        for variant, method in models.items()
        for name, plan in PLANS.items()
        # The small models have two layers.
        if name != "interleaved" or variant == UNEVEN
    }  # fmt: skip
    [found] = found_by(launch("run_shards.py", cases, tmp_path))
    assert found.keys() == cases.keys()
    for name, of_case in found.items():
        assert_saved_once(of_case, name)


@pytest.mark.full
def test_every_method_is_restored_under_every_other_plan(tmp_path):
    """Encoders with LSTMs and projections, prompts, adapters: what is not stacked, not transposed or not split."""
    plans = {"fsdp": FSDP, "mixed": MIXED, "pipe": PIPE, "one": ONE}
    cases = {
        name: COMMON | {"method": method, "plan": FSDP, "to": plans, "precision": precision("fp32")}
        for name, method in sections({}).items()
    }
    cases["interleaved"] = COMMON | {
        "variant": UNEVEN,
        "method": FULL,
        "plan": INTERLEAVED,
        "to": plans,
        "precision": precision("fp64"),
    }
    [found] = found_by(launch("run_shards.py", cases, tmp_path))
    for name, of_case in found.items():
        assert_saved_once(of_case, name)
        assert not of_case["error"], name
        assert [plan for plan in plans if not of_case[plan]] == [], name
        assert not of_case["another"], name


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_save_one_checkpoint_with_nothing_gathered(tmp_path, processes):
    common = COMMON | {"precision": precision("fp32")}
    cases = {
        "fsdp": common | {"method": FULL, "plan": FSDP, "to": {"mixed": MIXED}},
        "mixed": common | {"method": FULL, "variant": "tied", "plan": MIXED, "to": {"fsdp": FSDP}},
        "data": common | {"method": FULL, "plan": {"data": 8}, "to": {"mixed": MIXED}},
        "pipe": common | {"method": LORA, "variant": UNEVEN, "plan": PIPE | {"fsdp": 4, "shards": "optimizer"}, "to": {"fsdp": FSDP}},
        "omits": common | {"method": FULL, "plan": FSDP, "omits": "model.norm.weight"},
        "native": common | {"method": FULL, "plan": MIXED, "to": {"fsdp": FSDP}, "checkpoint": NATIVE},
    }  # fmt: skip
    found = found_by(launch("run_shards.py", cases, tmp_path / "many", processes=processes))
    omitted = [of_process.pop("omits") for of_process in found]
    for name in found[0]:
        parts = [of_process[name] for of_process in found]
        for part in parts:
            assert part["equal"], name
            assert part["sizes known"], name
            assert (part["gathered"], part["more"], part["error"]) == (0, 0, ""), name
            assert [target for target in cases[name]["to"] if not part[target]] == [], name
            assert not part["another"], name
        assert sum(part["once"] for part in parts) == parts[0]["elements"], name
        # Each saves its share; what several hold is spread over them, whole arrays at a time.
        largest = max(part["bytes"] for part in parts)
        assert largest <= 1.5 * sum(part["bytes"] for part in parts) / processes, name
        written = [part for part in parts[0]["files"] if part.endswith(".safetensors")]
        assert len(written) == (0 if name == "native" else 3 * processes)
    # The leader found that something was not there: nobody has a checkpoint, and nothing is left.
    assert "incomplete checkpoint: no file has all of model.norm.weight" in omitted[0]["error"]
    assert "\n" not in omitted[0]["error"]
    assert all((part["files"], part["left"]) == ([], []) for part in omitted)
    # One process takes it all, on one device and on eight.
    alone = {
        f"{name}/{target}": {k: v for k, v in cases[name].items() if k != "to"}
        | {"plan": plan, "from": str(tmp_path / "many/saved" / name)}
        for name in found[0]
        for target, plan in {"one": ONE, "mixed": MIXED}.items()
    }
    [restored] = found_by(launch("run_shards.py", alone, tmp_path / "alone"))
    assert [name for name, of_case in restored.items() if not of_case["same"]] == []


@pytest.mark.full
def test_a_save_has_the_state_before_the_updates_that_are_made_meanwhile(tmp_path):
    """They reuse the memory of the arrays that are saved."""
    common = COMMON | {"method": FULL, "precision": precision("bf16"), "updates": 2}
    cases = {
        f"{format_}-{name}": common | {"plan": plan, "to": {"one": ONE}, "checkpoint": {"format": format_}}
        for format_ in ("portable", "native")
        for name, plan in {"fsdp": FSDP, "one": ONE}.items()
    }
    [found] = found_by(launch("run_shards.py", cases, tmp_path))
    for name, of_case in found.items():
        assert (of_case["error"], of_case["one"], of_case["another"]) == ("", True, False), name


@pytest.mark.full
def test_orbax_there_and_back(tmp_path):
    """Native arrays of the same shape and order are read under any plan, others are refused by name; portable ones are not."""
    common = COMMON | {"checkpoint": NATIVE, "precision": precision("fp32"), "converted": True}
    plans = {"fsdp": FSDP, "mixed": MIXED, "pipe": PIPE, "one": ONE}
    lora = LORA | {"targets": ["q_proj", "down_proj"]}
    cases = {
        "full": common | {"method": FULL, "variant": "tied", "plan": FSDP, "to": plans},
        "masters": common | {"method": FULL, "plan": MIXED, "to": plans, "precision": precision("bf16")},
        "lora": common | {"method": lora, "plan": PIPE, "to": plans},
        "encoder": common | {"method": sections({})["prefix"], "plan": FSDP, "to": plans},
        "chunks": common | {"variant": UNEVEN, "method": FULL, "plan": INTERLEAVED, "to": {"same": INTERLEAVED, "one": ONE}},
    }  # fmt: skip
    spoiled = {"method": FULL, "plan": FSDP, "spoiled": "model.norm.weight"}
    cases["nan-native"] = common | spoiled
    cases["nan-portable"] = common | spoiled | {"checkpoint": {"format": "portable"}}
    [found] = found_by(launch("run_shards.py", cases, tmp_path))
    for name in ("nan-native", "nan-portable"):
        of_case = found.pop(name)
        assert "not finite; no checkpoint was written" in of_case["error"], name
        assert (of_case["files"], of_case["left"]) == ([], []), name
    refusal = found["chunks"].pop("one")
    saved = tmp_path / "saved/chunks/checkpoints/step-000003"
    assert refusal.startswith(f"{saved}: ")
    assert "has layers 0 3 1 - 2 4 - -, and layers 0 1 2 3 4 under this plan" in refusal
    assert refusal.endswith(f"; resume under the plan that it was made with, or convert it: trainspec checkpoint convert {saved} OUT --to portable")  # fmt: skip
    assert "\n" not in refusal
    for name, of_case in found.items():
        assert not of_case["error"], name
        assert [plan for plan in cases[name]["to"] if not of_case.get(plan, True)] == [], name
        assert of_case["converted"] == [["portable", True], ["native", True]], name
        assert not of_case["another"], name
        assert of_case["left"] == ["latest", "step-000003"], name
        assert all(file.startswith("native/") for file in of_case["files"]), name


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_save_and_a_load_take_the_memory_of_the_process_s_share(tmp_path, processes):
    case = COMMON | {"method": FULL, "plan": FSDP, "precision": precision("fp32")}
    found = found_by(launch("run_memory.py", {"fsdp": case}, tmp_path, processes=processes))
    for of_process in (of_process["fsdp"] for of_process in found):
        assert of_process["share"] == pytest.approx(found[0]["fsdp"]["share"], rel=0.01)
        for what in ("save", "load"):
            # The control: both hold the share itself, which a measurement that misses it would not show.
            assert of_process[what] > 0.8 * of_process["share"], what
            assert of_process[what] <= MEMORY * of_process["share"] + of_process["tensor"], what
        # The next save copies into the same memory.
        assert of_process["again"] <= (MEMORY - 1) * of_process["share"] + of_process["tensor"]
