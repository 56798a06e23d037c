"""What is held and moved, read from the compiled programs: bytes to the specs, nothing whole that should be split."""

import json

import pytest
from launch import launch
from test_plans import FP64, FULL, LORA, PLANS, SHARDS

BF16 = {"policy": "bf16", "reduce": "fp32"}
# Bytes of a weight, a gradient and a moment.
WIDTHS = {"fp64": (8, 8, 8), "bf16": (2, 4, 4)}
# LoRA's dropout keys, 8 bytes for each adapted module, are counted with the weights.
KEYS = 0.02
PTUNING = {"kind": "ptuning", "virtual_tokens": 5, "hidden": 24}
ROWS = {"batch": {"global_examples": 16, "accumulation": 2}, "data": {"sequence_tokens": 100}}
WIDE = {
    "method": FULL,
    "precision": FP64,
    "batch": {"global_examples": 8},
    "data": {"sequence_tokens": 16},
    "plan": {"fsdp": 8, "shards": "params", "remat": "full"},
}


def facts(scratch, cases) -> dict:
    return json.loads(launch("read_programs.py", cases, scratch)[0].read_text())


def assert_bytes_are_those_of_the_table(found, precision) -> None:
    weight, gradient, moment = WIDTHS[precision["policy"]]
    elements, held = found["elements"], found["held"]
    assert held["weights"] == pytest.approx(elements["weights"] * weight, rel=KEYS)
    assert held["gradients"] == elements["gradients"] * gradient
    assert held["moments"] == 2 * elements["optimizer"] * moment
    assert held["master"] == (elements["optimizer"] * moment if precision["policy"] == "bf16" else 0)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict:
    cases = {
        "fsdp": ROWS | {"method": FULL, "precision": FP64, "plan": PLANS["fsdp8-params"]},
        "tensor": ROWS | {"method": FULL, "precision": BF16, "plan": PLANS["fsdp4-tensor2-optimizer"]},
        "frozen": ROWS | {"method": LORA, "precision": BF16, "plan": PLANS["fsdp8-params"]},
        "ptuning": ROWS | {"method": PTUNING, "precision": FP64, "plan": PLANS["data8"], "held_only": True},
    }
    return facts(tmp_path_factory.mktemp("few"), cases)


def test_bytes_are_those_of_the_table(few):
    assert_bytes_are_those_of_the_table(few["fsdp"], FP64)
    assert_bytes_are_those_of_the_table(few["tensor"], BF16)


def test_nothing_frozen_has_a_gradient_or_moments(few):
    assert_bytes_are_those_of_the_table(few["ptuning"], FP64)
    held = few["ptuning"]["held"]
    assert 0 < held["gradients"] < 0.2 * held["weights"]


def test_no_device_has_the_logits_whole_where_the_vocabulary_is_split(few):
    assert not few["tensor"]["logits"]
    # The control: without tensor every device has its examples' logits.
    assert few["fsdp"]["logits"]


def matrices_reduced(found: dict) -> set[str]:
    """Types in which gradients of matrices are summed over the replicas."""
    return {
        c["dtype"]
        for c in found["moved"]
        if (c["program"], c["kind"], c["devices"]) == ("gradients", "all-reduce", 4)
        and c["payload_bytes"] > 1000
    }


def test_gradients_travel_in_the_type_of_reduce(few):
    assert few["tensor"]["types"] == {"trainable": "bfloat16", "master": "float32"}
    assert matrices_reduced(few["tensor"]) == {"f32"}
    # Of the update only the copy to compute with travels.
    gathered = {c["dtype"] for c in few["tensor"]["moved"] if c["program"] == "update"}
    assert gathered == {"bf16"}


def types_gathered(found: dict) -> set[str]:
    """Types in which split weights are gathered for a pass."""
    return {
        c["dtype"]
        for c in found["moved"]
        if (c["program"], c["kind"]) == ("gradients", "all-gather") and c["payload_bytes"] > 1000
    }


def test_frozen_weights_travel_in_the_type_that_they_are_stored_in(few):
    """Most of what LoRA gathers under `shards: params` is frozen; nothing is widened on its way."""
    found = few["frozen"]
    assert types_gathered(found) == {"bf16"}
    frozen = found["elements"]["weights"] - found["elements"]["optimizer"]
    assert traffic(found)["gradients", "all-gather"] > MICROBATCHES * 8 * frozen * 2
    # The control: the type is read from the program.
    assert types_gathered(few["fsdp"]) == {"f64"}


MICROBATCHES = 2
# A lookup needs no table on its way back.
EMBEDDING_BYTES = 320 * 32 * 8


def traffic(found: dict) -> dict[tuple[str, str], int]:
    """Bytes by program and kind, without sums of scalars."""
    sums: dict[tuple[str, str], int] = {}
    for c in found["moved"]:
        if c["payload_bytes"] > 200:
            at = (c["program"], c["kind"])
            sums[at] = sums.get(at, 0) + c["payload_bytes"] * c["times"]
    return sums


def test_split_weights_are_gathered_twice_and_their_gradients_reduced_once(few):
    """Three times the weights for each microbatch (arXiv 1910.02054, section 7.2), the head and the norm as well."""
    weights = few["fsdp"]["held"]["weights"] * 8
    assert traffic(few["fsdp"]) == {
        ("gradients", "all-gather"): MICROBATCHES * (2 * weights - EMBEDDING_BYTES),
        ("gradients", "reduce-scatter"): MICROBATCHES * weights,
    }


@pytest.mark.full
def test_traffic_of_every_kind_of_shards(tmp_path):
    """What travels is the sum of gradients, and the updated weights where not every device has updated them all."""
    common = ROWS | {"method": FULL, "precision": FP64}
    plans = {s: PLANS[f"fsdp8-{s}"] for s in SHARDS[:-1]} | {"mixed": PLANS["mixed-gradients"]}
    found = facts(tmp_path, {name: common | {"plan": plan} for name, plan in plans.items()})
    weights = found["nothing"]["held"]["weights"]
    summed = {("gradients", "all-reduce"): MICROBATCHES * weights}
    gathered = {("update", "all-gather"): weights}
    assert traffic(found["nothing"]) == summed
    assert traffic(found["optimizer"]) == summed | gathered
    assert traffic(found["gradients"]) == {("gradients", "reduce-scatter"): MICROBATCHES * weights} | gathered
    # A sum over data × fsdp of which fsdp's shard is kept is no reduce-scatter.
    assert ("gradients", "reduce-scatter") not in traffic(found["mixed"])


@pytest.mark.full
def test_every_plan_holds_what_the_table_says(tmp_path):
    """Every plan twice: with full training and with LoRA, in fp64 with the one and in bf16 with the other, in turns."""
    cases = {}
    for i, mesh in enumerate(("fsdp8", "mixed", "fsdp4-tensor2")):
        for j, shards in enumerate(SHARDS):
            for k, method in enumerate((FULL, LORA)):
                common = ROWS | {"method": method, "precision": (FP64, BF16)[(i + j + k) % 2]}
                cases[f"{mesh}-{shards}-{k}"] = common | {
                    "plan": PLANS[f"{mesh}-{shards}"],
                    "held_only": True,
                }
    for name, found in facts(tmp_path, cases).items():
        assert_bytes_are_those_of_the_table(found, cases[name]["precision"])


@pytest.mark.full
def test_reduction_in_bfloat16(tmp_path):
    precision = {"policy": "bf16", "reduce": "bf16"}
    found = facts(tmp_path, {"it": ROWS | {"method": FULL, "precision": precision, "plan": {"data": 4}}})[
        "it"
    ]
    # The embedding's, and the norms', are summed in float32 whatever the recipe says.
    assert matrices_reduced(found) == {"bf16", "f32"}
    assert sum(c["dtype"] == "f32" and c["payload_bytes"] > 1000 for c in found["moved"]) == 1


@pytest.mark.full
def test_gathered_weights_are_not_kept_for_the_backward_pass(tmp_path):
    cases = {f"{n}": WIDE | {"variant": f"wide-{n}"} for n in (2, 6)}
    plain = {f"{n}-plain": case | {"plan": case["plan"] | {"remat": "none"}} for n, case in cases.items()}
    saved = {f"{n}-saved": case | {"saves_gathered": True} for n, case in plain.items()}
    found = facts(tmp_path, cases | plain | saved)
    layer = (found["6"]["held"]["weights"] - found["2"]["held"]["weights"]) * 8 / 4

    def growth(kind: str) -> float:
        """By how much of a layer's weights the scratch memory grows with every layer."""
        small, large = (found[f"{n}{kind}"]["held"]["gradients_temp"] for n in (2, 6))
        return (large - small) / 4 / layer

    assert growth("") < 0.2
    assert growth("-plain") < 0.4
    # The control.
    assert growth("-plain-saved") > 0.9
