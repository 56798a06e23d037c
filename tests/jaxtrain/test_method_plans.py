"""Every method trains under every plan as on one device, in float64 on eight fake devices, and holds what it trains only.

What `make test` runs of it is in test_pipeline.py and test_programs.py, whose launches are there anyway.
"""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from launch import Runs, launch, worst
from method_sections import sections
from test_pipeline import MESHES, PROJECTION, SCHEDULES
from test_plans import COMMON, PLANS, ROUNDING, assert_equal
from test_programs import ROWS, assert_bytes_are_those_of_the_table

# Five virtual tokens and widths that few devices divide.
FIVE = {"virtual_tokens": 5}
METHODS = sections(
    {
        "lora": {"rank": 3, "alpha": 5.0, "rslora": True, "dropout": 0.0, "targets": "all-linear"},
        "adapter": {"bottleneck": 6},
        "prompt": FIVE,
        "ptuning-mlp": FIVE | {"hidden": 24},
        "ptuning-lstm": FIVE | {"hidden": 12, "dropout": 0.3},
        "prefix": FIVE,
        "prefix-projection": PROJECTION,
    }
)
del METHODS["full"]  # see test_plans.py
# Five layers: the stages of a pipeline are unequal. A head that is the embedding has no prompt in front of it.
VARIANT = dict.fromkeys(METHODS, "plain-5") | {"adapter": "bias-5", "prompt": "tied-5", "prefix": "tied-5"}
TWO_MESHES = ("pipe2-data2-tensor2", "pipe2-fsdp2-tensor2")
PIPELINES = {
    f"{mesh}-{schedule}": MESHES[mesh] | {"schedule": schedule, "microbatches": 4}
    for mesh, schedule in itertools.product(TWO_MESHES, SCHEDULES)
}
# Those that `parity matrix` has not, as it has every method on four devices at most but for pipelines; in turns.
WIDER = {
    name: PLANS[name] for name in ("fsdp8-params", "tensor4", "data8", "mixed-gradients", "fsdp8-optimizer")
}
RECOMPUTED = {
    "pipe2-fsdp2-tensor2-remat": PIPELINES["pipe2-fsdp2-tensor2-gpipe"] | {"remat": "full"},
    "mixed-params-remat": PLANS["mixed-params"] | {"remat": "full"},
}
# One of each way to train: in the layers, in front of them with dropout, before every layer's keys.
SOME = ("lora", "ptuning-lstm", "prefix-projection")


def in_turn(name: str, plans: dict) -> dict:
    """The one of the plans that is a method's."""
    chosen = list(plans)[list(METHODS).index(name) % len(plans)]
    return {chosen: plans[chosen]}


def case(name: str, **data: object) -> dict:
    return COMMON | {"method": METHODS[name], "variant": VARIANT[name], "data": COMMON["data"] | data}


def differences(scratch, one: dict, plans: dict) -> dict[str, dict[str, float]]:
    cases = {"one": one} | {name: one | {"plan": plan} for name, plan in plans.items()}
    runs = Runs(launch("run_plans.py", cases, scratch)[0])
    return {name: worst(runs.of(name), runs.of("one")) for name in plans}


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_every_method_under_a_wider_plan(tmp_path, name):
    """`parity matrix` has every method on every kind of plan, compared with torch on one device in the same precision."""
    assert_equal(differences(tmp_path, case(name), in_turn(name, WIDER)), ROUNDING)


@pytest.mark.full
@pytest.mark.parametrize(("name", "side"), [(name, ("left", "right")[i % 2]) for i, name in enumerate(SOME)])
def test_each_way_to_train_in_a_pipeline_and_on_padded_rows(tmp_path, name, side):
    padded = case(name, packing=False, padding_side=side)
    assert_equal(differences(tmp_path / "packed", case(name), in_turn(name, PIPELINES)), ROUNDING)
    assert_equal(differences(tmp_path / "padded", padded, in_turn(name, RECOMPUTED)), ROUNDING)


@pytest.mark.full
def test_a_method_that_is_another_would_show(tmp_path):
    """The negative control: another dropout rate between the layers of the LSTM, another activation."""
    gelu, lstm = METHODS["adapter"], METHODS["ptuning-lstm"]
    cases = {name: case(name) for name in ("adapter", "ptuning-lstm")}
    cases |= {
        "adapter-other": cases["adapter"] | {"method": gelu | {"activation": "silu"}},
        "ptuning-lstm-other": cases["ptuning-lstm"] | {"method": lstm | {"dropout": 0.31}},
    }
    runs = Runs(launch("run_plans.py", cases, tmp_path)[0])
    for name in ("adapter", "ptuning-lstm"):
        found = worst(runs.of(f"{name}-other"), runs.of(name))
        assert found["gradient"] > 1e-3
        assert found["update"] > 1e-3


@pytest.mark.full
def test_four_processes_are_one(tmp_path):
    plans = {
        "ptuning-lstm": PLANS["fsdp8-params"],
        "prefix-projection": PIPELINES["pipe2-fsdp2-tensor2-1f1b"],
    }
    cases = {name: case(name) | {"plan": plan} for name, plan in plans.items()}
    one = Runs(launch("run_plans.py", cases, tmp_path / "one")[0])
    for out in launch("run_plans.py", cases, tmp_path / "four", processes=4):
        assert_equal({name: worst(Runs(out).of(name), one.of(name)) for name in cases}, 1e-12)


@pytest.mark.full
@pytest.mark.parametrize("name", SOME[:2])
def test_bfloat16_stays_near_float64_and_sums_in_float32(tmp_path, name):
    """Of two microbatches and of four, on two replicas, under one pipeline each: no gradient is one of bfloat16 numbers."""
    one = case(name)
    bf16 = one | {"precision": {"policy": "bf16", "reduce": "fp32"}}
    pipelines = {n: PIPELINES[n] for n in ("pipe2-fsdp2-tensor2-1f1b", "pipe2-data2-tensor2-gpipe")}
    plans = {"mixed": PLANS["mixed-params"]} | in_turn(name, pipelines)
    cases = {"one": one} | {plan: bf16 | {"plan": sizes} for plan, sizes in plans.items()}
    runs = Runs(launch("run_plans.py", cases, tmp_path)[0])
    for plan in plans:
        found = runs.of(plan)
        off = worst(found, runs.of("one"))
        assert 1e-6 < off["loss"] < 1e-3
        # The start's: the update makes whole steps of gradients that are small.
        for key, theirs in runs.of("one").items():
            if key.startswith("gradient/0/") and theirs.any():
                mine = found[key]
                assert 1e-4 < np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 0.05, (plan, key)
                assert (mine != mine.astype(ml_dtypes.bfloat16).astype(mine.dtype)).any(), (plan, key)


@pytest.mark.full
@pytest.mark.parametrize(
    ("precision", "plans"),
    [
        (COMMON["precision"], ("fsdp8-params", "mixed-optimizer")),
        ({"policy": "bf16", "reduce": "fp32"}, ("mixed-optimizer", "fsdp8-params")),
    ],
    ids=["fp64", "bf16"],
)
def test_nothing_frozen_has_a_gradient_or_moments(tmp_path, precision, plans):
    """Bytes of the compiled step: of gradients, masters and moments there are those of the weights that are trained.

    Every method on both plans, on one of them in fp64 and on the other in bf16.
    """
    common = ROWS | {"precision": precision, "held_only": True}
    cases = {
        name: common | {"method": method, "plan": PLANS[plans[number % 2]]}
        for number, (name, method) in enumerate(METHODS.items())
    }
    for found in json.loads(launch("read_programs.py", cases, tmp_path)[0].read_text()).values():
        assert_bytes_are_those_of_the_table(found, precision)
