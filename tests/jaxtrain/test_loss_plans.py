"""The loss in chunks under plans: the numbers of one device without chunks, and what its compiled programs hold and move."""

import json

import pytest
from launch import Runs, launch, worst
from test_plans import COMMON, FP64, FULL, LORA, MIXED, PLANS, ROUNDING, assert_equal

HEAD = LORA | {"targets": ["lm_head", "k_proj"]}
CHUNK = {"loss_chunk": 7}  # divides no row
CASE = COMMON | {"keep": "gradients"}
SPLIT = {
    "tensor": {"tensor": 2},
    "fsdp": {"fsdp": 2, "shards": "params"},
    "mixed": MIXED | {"shards": "params"},
    "gpipe": {"pipe": 2, "data": 2, "microbatches": 2, "schedule": "gpipe"},
    "1f1b": {"pipe": 2, "fsdp": 2, "tensor": 2, "shards": "params", "microbatches": 2, "schedule": "1f1b"},
}
METHODS = {"full": CASE | {"method": FULL, "variant": "tied"}, "head": CASE | {"method": HEAD}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    cases = dict(METHODS)
    for method, case in METHODS.items():
        cases |= {f"{method}-{name}": case | {"plan": plan | CHUNK} for name, plan in SPLIT.items()}
    # The control, whose dropout is another.
    other = METHODS["head"] | {"method": HEAD | {"dropout": 0.11}}
    cases["head-other"] = other | {"plan": SPLIT["tensor"] | CHUNK}
    return Runs(launch("run_plans.py", cases, tmp_path_factory.mktemp("runs"))[0])


@pytest.mark.full(minutes=1.5)
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("method", METHODS)
def test_chunks_under_a_plan_train_as_one_device_without(runs, method, name):
    assert_equal({name: worst(runs.of(f"{method}-{name}"), runs.of(method))}, ROUNDING)


@pytest.mark.full(minutes=1.5)
def test_other_masks_would_show(runs):
    assert worst(runs.of("head-other"), runs.of("head"))["gradient"] > 1e-3


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict:
    rows = {"batch": {"global_examples": 16, "accumulation": 2}, "data": {"sequence_tokens": 100}}
    case = rows | {"method": FULL, "precision": FP64}
    plans = {"fsdp": PLANS["fsdp8-params"], "mixed": PLANS["mixed-params"]}
    cases = {name: case | {"plan": plan} for name, plan in plans.items()}
    cases |= {f"{name}-chunks": case | {"plan": plan | CHUNK} for name, plan in plans.items()}
    return json.loads(launch("read_programs.py", cases, tmp_path_factory.mktemp("programs"))[0].read_text())


@pytest.mark.full(minutes=1.5)
def test_no_device_has_the_logits_of_its_examples(programs):
    assert not programs["fsdp-chunks"]["logits"]
    assert not programs["mixed-chunks"]["logits"]
    # The control.
    assert programs["fsdp"]["logits"]


def sent(program: dict, kind: str, devices: int) -> int:
    """Bytes of all that is gathered or reduced so over that many devices while gradients are made."""
    return sum(
        c["payload_bytes"] * c["times"]
        for c in program["moved"]
        if (c["program"], c["devices"]) == ("gradients", devices) and c["kind"].startswith(kind)
    )


@pytest.mark.full(minutes=1.5)
def test_a_head_is_gathered_and_its_gradient_reduced_once_for_all_chunks(programs):
    chunks, plain = programs["fsdp-chunks"], programs["fsdp"]
    # Without chunks the head is gathered twice, as the backward pass gathers it again.
    assert sent(chunks, "all-gather", 8) < sent(plain, "all-gather", 8)
    for kind in ("reduce-scatter", "all-reduce"):
        assert sent(chunks, kind, 8) <= 1.01 * sent(plain, kind, 8)
    assert sent(plain, "reduce-scatter", 8) > 0


@pytest.mark.full(minutes=1.5)
def test_a_split_vocabulary_is_not_gathered(programs):
    assert sent(programs["mixed-chunks"], "all-gather", 2) <= sent(programs["mixed"], "all-gather", 2)
