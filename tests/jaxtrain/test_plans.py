"""Every plan trains as one device does, in float64 on eight fake devices."""

import numpy as np
import pytest
from launch import Runs, launch, worst
from method_sections import sections
from small import QA

FP64 = {"policy": "fp64", "reduce": "fp64"}
FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": "all-linear"}
COMMON = {
    "precision": FP64,
    "data": {
        "packing": True,
        "sequence_tokens": 100,
        "too_long": "split",
        "heldout": str(QA.with_name("qa-heldout.jsonl")),
    },
    "batch": {"global_examples": 16, "accumulation": 2},
    "optimizer": {"clip_norm": 0.5},
}
# Sums in another order, through Adam, which divides by gradients that may be small.
ROUNDING = 1e-10
# Another order of the same sums between processes.
SAME_SUMS = 1e-12
SHARDS = ("nothing", "optimizer", "gradients", "params")
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
PLANS = {
    "data8": {"data": 8},
    **{f"fsdp8-{s}": {"fsdp": 8, "shards": s} for s in SHARDS},
    "tensor2": {"tensor": 2},
    "tensor4": {"tensor": 4},
    **{f"mixed-{s}": MIXED | {"shards": s} for s in SHARDS},
    **{f"fsdp4-tensor2-{s}": {"fsdp": 4, "tensor": 2, "shards": s} for s in SHARDS},
}

NAMED = ("lora", "lora-fsdp", "tied", "tied-mixed", "lora-unrolled", "tied-unrolled")


def assert_equal(found: dict[str, dict[str, float]], bound: float) -> None:
    for name, kinds in found.items():
        for kind, difference in kinds.items():
            assert difference <= bound, (name, kind, difference)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Runs:
    """A run for each kind of thing that a plan does, in one process: imports cost more than steps."""
    adapters = LORA | {"targets": ["lm_head", "k_proj", "o_proj", "up_proj", "down_proj"]}
    lora, tied = COMMON | {"method": adapters}, COMMON | {"method": FULL, "variant": "tied"}
    resumed = lora | {"first_plan": PLANS["fsdp4-tensor2-optimizer"], "plan": PLANS["fsdp8-params"]}
    cases = {
        "lora": lora,
        "lora-fsdp": lora | {"plan": PLANS["fsdp8-params"]},
        "lora-tensor": lora | {"plan": PLANS["fsdp4-tensor2-optimizer"]},
        "lora-resumed": resumed,
        "lora-unrolled": lora | {"unrolled": True},
        "tied-unrolled": tied | {"plan": PLANS["mixed-params"], "unrolled": True},
        "lora-other": lora | {"method": adapters | {"dropout": 0.11}, "plan": {"data": 2}},
        "tied": tied,
        "tied-mixed": tied | {"plan": PLANS["mixed-params"] | {"remat": "full"}},
    }
    return Runs(launch("run_plans.py", cases, tmp_path_factory.mktemp("few"))[0])


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["lora-tensor", "lora-fsdp", "lora-resumed", "tied-mixed", "lora-unrolled", "tied-unrolled"]
)
def test_a_plan_trains_as_one_device_does(few, name):
    assert_equal({name: worst(few.of(name), few.of(name.partition("-")[0]))}, ROUNDING)


@pytest.mark.full
def test_layers_are_unrolled_where_they_should_be(few):
    assert {name for name in NAMED if few.of(name)["unrolled"]} == {"lora-unrolled", "tied-unrolled"}


@pytest.mark.full
def test_a_plan_that_trains_something_else_would_show(few):
    """The negative control: another dropout rate."""
    found = worst(few.of("lora-other"), few.of("lora"))
    assert found["gradient"] > 1e-3
    assert found["update"] > 1e-3


# What the plans are run with, in turns; recomputed where there are biases.
TURNS = [(FULL, "plain"), (LORA, "bias"), (FULL, "tied"), (LORA, "plain"), (FULL, "bias"), (LORA, "tied")]
REMAT = {"bias": {"remat": "full"}}


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Runs:
    """Each of `TURNS` on one device, `one-N`, and every plan with one of them."""
    alone = [COMMON | {"method": method, "variant": variant} for method, variant in TURNS]
    cases = {f"one-{n}": case for n, case in enumerate(alone)}
    for number, (name, plan) in enumerate(PLANS.items()):
        case = alone[number % len(TURNS)]
        cases[name] = case | {"plan": plan | REMAT.get(case["variant"], {})}
    return Runs(launch("run_plans.py", cases, tmp_path_factory.mktemp("turns"))[0])


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("name", PLANS)
def test_every_plan(turns, name):
    """Every plan once, full training and LoRA on the three models in turns: `parity matrix` has both methods on its plans."""
    number = list(PLANS).index(name) % len(TURNS)
    assert_equal({name: worst(turns.of(name), turns.of(f"one-{number}"))}, ROUNDING)


@pytest.mark.full
def test_four_processes_are_one(tmp_path):
    """Gloo between four processes of two devices each; each reads what its devices hold."""
    cases = {
        "mixed": COMMON | {"method": FULL, "plan": PLANS["mixed-params"]},
        "fsdp": COMMON | {"method": LORA, "plan": PLANS["fsdp8-params"]},
    }
    one = Runs(launch("run_plans.py", cases, tmp_path / "one")[0])
    four = [Runs(out) for out in launch("run_plans.py", cases, tmp_path / "four", processes=4)]
    for name in cases:
        for runs in four:
            assert_equal({name: worst(runs.of(name), one.of(name))}, SAME_SUMS)
    whole = int(one.of("fsdp")["read"])
    assert [int(runs.of("fsdp")["read"]) for runs in four] == [whole // 4] * 4
    # Split four ways by fsdp and tensor, and once more over data, whose two halves hold the same.
    whole = int(one.of("mixed")["read"])
    assert [int(runs.of("mixed")["read"]) for runs in four] == [whole // 2] * 4


def again(plan: dict) -> dict:
    """A case under `plan` that is stopped after its first update, and resumed: without a pipeline a schedule means nothing."""
    return {"plan": plan, "first_plan": plan | {"schedule": "gpipe"}}


@pytest.mark.full
def test_a_run_in_two_parts_is_one_run(tmp_path):
    """Bit by bit under the same plan, in every precision; within rounding under another. Losses, updates, moments, evaluation."""
    common = {key: COMMON[key] for key in ("data", "batch", "optimizer")} | {"keep": "gradients"}
    policies = {
        name: {"policy": name, "reduce": "fp64" if name == "fp64" else "fp32"}
        for name in ("fp64", "fp32", "bf16")
    }
    methods = {"lora": LORA, "tied": FULL, "prefix": sections({})["prefix"]}
    mixed, pipe = PLANS["mixed-params"], {"pipe": 2, "microbatches": 2}
    cases, whole = {}, {}
    for name, method in methods.items():
        for policy, precision in policies.items():
            if name == "lora" or policy == "fp64":
                case = (
                    common
                    | {"method": method, "precision": precision}
                    | ({"variant": "tied"} if name == "tied" else {})
                )
                cases[f"{name}-{policy}"] = case | {"plan": mixed}
                cases[f"{name}-{policy}-resumed"] = case | again(mixed)
                whole[f"{name}-{policy}-resumed"] = f"{name}-{policy}"
    lora = cases["lora-fp64"]
    cases["lora-native"] = lora | again(mixed) | {"checkpoint": {"format": "native"}}
    whole["lora-native"] = "lora-fp64"
    changed = {
        "1-to-8": lora | {"first_plan": {}, "plan": PLANS["fsdp8-params"]},
        "fsdp-to-mixed": lora | {"first_plan": PLANS["fsdp8-params"]},
        "pipe-to-1": lora | {"first_plan": pipe, "plan": {}},
        "native-fsdp-to-mixed": lora
        | {"first_plan": PLANS["fsdp8-optimizer"], "checkpoint": {"format": "native"}},
    }
    runs = Runs(launch("run_plans.py", cases | changed, tmp_path)[0])
    for name, straight in whole.items():
        assert set(worst(runs.of(name), runs.of(straight)).values()) == {0.0}, name
    assert_equal({name: worst(runs.of(name), runs.of("lora-fp64")) for name in changed}, ROUNDING)
    # The control: these are other runs.
    assert worst(runs.of("lora-fp32"), runs.of("lora-fp64"))["update"] > ROUNDING


@pytest.mark.full
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_bfloat16_stays_near_float64(tmp_path, reduce):
    """Eight bits of mantissa, a few dozen roundings in a row; the masters and moments are float32."""
    bf16 = COMMON | {"method": FULL, "precision": {"policy": "bf16", "reduce": reduce}}
    plans = ("fsdp8-params", "fsdp4-tensor2-optimizer")
    cases = {"one": COMMON | {"method": FULL}} | {name: bf16 | {"plan": PLANS[name]} for name in plans}
    cases["resumed"] = bf16 | again(PLANS[plans[0]])
    runs = Runs(launch("run_plans.py", cases, tmp_path)[0])
    for name in plans:
        found = worst(runs.of(name), runs.of("one"))
        assert 1e-6 < found["loss"] < 1e-3
        assert 1e-4 < found["gradient"] < 0.05
        assert runs.of(name)["moment2/0/model.norm.weight"].dtype == np.float32
    # A checkpoint has the masters, not their rounded copies.
    assert set(worst(runs.of("resumed"), runs.of(plans[0])).values()) == {0.0}
