"""Every schedule of a pipeline trains as one device does, in float64 on eight fake devices; and what it costs."""

import itertools
import json

import pytest
from launch import Runs, launch, worst
from test_plans import COMMON, FULL, LORA, ROUNDING, assert_equal

from trainspec.backends import BACKENDS
from trainspec.plans.capabilities import expected_bubble
from trainspec.plans.pipeline import Work, bubble
from trainspec.plans.plan import Plan

SCHEDULES = ("gpipe", "1f1b", "interleaved")
MESHES = {
    "pipe2-data2-tensor2": {"pipe": 2, "data": 2, "tensor": 2},
    "pipe2-fsdp2-tensor2": {"pipe": 2, "fsdp": 2, "tensor": 2, "shards": "params"},
    "pipe4-fsdp2": {"pipe": 4, "fsdp": 2, "shards": "gradients"},
}
# Every stage takes its own layers' prefix from one encoder.
PROJECTION = {"kind": "prefix", "virtual_tokens": 5, "projection": True, "hidden": 20}


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Runs:
    """Each schedule once, the stages unequal, two accumulation slices of eight microbatches; one resumes from one device.

    The logits are those of eight examples, which do not divide into eight microbatches on two replicas.
    """
    adapters = LORA | {"targets": ["lm_head", "k_proj", "o_proj", "up_proj", "down_proj"]}
    batch = {"global_examples": 32, "accumulation": 2}
    lora = COMMON | {"method": adapters, "variant": "bias-5", "batch": batch}
    prefix = COMMON | {"method": PROJECTION, "variant": "plain-5"}
    data, fsdp = (
        MESHES[mesh] | {"microbatches": 8} for mesh in ("pipe2-data2-tensor2", "pipe2-fsdp2-tensor2")
    )
    cases = {
        "one": lora,
        "gpipe": lora | {"plan": data | {"schedule": "gpipe"}, "first_plan": {"pipe": 1}},
        "1f1b": lora | {"plan": fsdp | {"schedule": "1f1b", "remat": "full"}},
        "interleaved": lora | {"plan": fsdp | {"schedule": "interleaved"}},
        "prefix": prefix,
        "prefix-1f1b": prefix | {"plan": fsdp | {"microbatches": 4}},
    }
    return Runs(launch("run_plans.py", cases, tmp_path_factory.mktemp("few"))[0])


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_trains_as_one_device_does(few, schedule):
    assert_equal({schedule: worst(few.of(schedule), few.of("one"))}, ROUNDING)


@pytest.mark.full(minutes=2)
def test_a_prefix_is_trained_through_its_projection_in_a_pipeline(few):
    assert_equal({"prefix": worst(few.of("prefix-1f1b"), few.of("prefix"))}, ROUNDING)


@pytest.mark.full(minutes=2)
def test_a_pipeline_that_trains_something_else_would_show(few):
    """The negative control: one tensor's gradient a little larger; in test_plans.py it is another dropout rate."""
    found, alone = few.of("prefix-1f1b"), few.of("prefix")
    for name in [key for key in alone if key.startswith("gradient/1/")]:
        other = found | {name: found[name] * (1 + 1e-9)}
        assert worst(other, alone)["gradient"] > ROUNDING, name


# Five layers do not make the eight model chunks of four stages.
TURNS = {"nine": (FULL, "tied-9", True), "five": (LORA, "bias-5", False)}
# The schedules that `few` has not on a mesh.
OTHERS = [
    *itertools.product(("pipe4-fsdp2",), SCHEDULES),
    ("pipe2-data2-tensor2", "1f1b"),
    ("pipe2-data2-tensor2", "interleaved"),
    ("pipe2-fsdp2-tensor2", "gpipe"),
]


def every_schedule() -> dict[str, tuple[str, dict]]:
    """By name which of `TURNS` is trained, and the plan, recomputed with more microbatches."""
    found = {}
    for number, (mesh, schedule) in enumerate(OTHERS):
        microbatches = (4, 8)[number % 2]
        plan = MESHES[mesh] | {"schedule": schedule, "microbatches": microbatches}
        plan["remat"] = "full" if microbatches == 8 else "none"
        turn = "nine" if mesh == "pipe4-fsdp2" else "five"
        found[f"{mesh}-{schedule}-{microbatches}"] = turn, plan
    return found


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Runs:
    """Each of `TURNS` on one device, and every schedule with one of them."""
    alone = {
        name: COMMON
        | {
            "method": method,
            "variant": variant,
            "batch": {"global_examples": 16, "accumulation": 1},
            "data": COMMON["data"] | {"packing": packing},
        }
        for name, (method, variant, packing) in TURNS.items()
    }
    cases = alone | {name: alone[turn] | {"plan": plan} for name, (turn, plan) in every_schedule().items()}
    return Runs(launch("run_plans.py", cases, tmp_path_factory.mktemp("turns"))[0])


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("name", every_schedule())
def test_every_schedule(turns, name):
    """With what `few` has, every schedule once on every mesh, on packed and on padded rows, with few and more microbatches.

    Nine layers are three on some stages of four and two on others, and one or two in a model chunk.
    """
    turn, _ = every_schedule()[name]
    assert_equal({name: worst(turns.of(name), turns.of(turn))}, ROUNDING)


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_bfloat16_stays_near_float64(tmp_path, reduce):
    full = COMMON | {"method": FULL, "variant": "plain-4"}
    plan = MESHES["pipe2-fsdp2-tensor2"] | {"microbatches": 4}
    bf16 = full | {"precision": {"policy": "bf16", "reduce": reduce}}
    schedules = SCHEDULES if reduce == "fp32" else ("1f1b",)
    cases = {"one": full} | {s: bf16 | {"plan": plan | {"schedule": s}} for s in schedules}
    runs = Runs(launch("run_plans.py", cases, tmp_path)[0])
    for schedule in schedules:
        found = worst(runs.of(schedule), runs.of("one"))
        assert 1e-6 < found["loss"] < 1e-3
        assert 1e-4 < found["gradient"] < 0.05


@pytest.mark.full
def test_four_processes_are_one(tmp_path):
    """Each stage is on two processes; between them activations travel over gloo."""
    plan = MESHES["pipe2-fsdp2-tensor2"] | {"microbatches": 4}
    cases = {"it": COMMON | {"method": LORA, "variant": "plain-5", "plan": plan}}
    one = Runs(launch("run_plans.py", cases, tmp_path / "one")[0])
    for out in launch("run_plans.py", cases, tmp_path / "four", processes=4):
        assert_equal({"it": worst(Runs(out).of("it"), one.of("it"))}, 1e-12)


@pytest.mark.full
def test_memory_of_1f1b_does_not_grow_with_the_microbatches(tmp_path):
    """Nor does any schedule keep weights for a microbatch: `interleaved` would, if it kept the chunk that it selected."""
    plan = MESHES["pipe2-fsdp2-tensor2"]
    cases = {
        f"{schedule}-{microbatches}": {
            "variant": "wide-6",
            "method": FULL,
            "precision": {"policy": "fp32", "reduce": "fp32"},
            "batch": {"global_examples": 2 * microbatches},
            "data": {"sequence_tokens": 16},
            "plan": plan | {"schedule": schedule, "microbatches": microbatches},
            "held_only": True,
        }
        for schedule, microbatches in itertools.product(SCHEDULES, (8, 16))
    }
    found = json.loads(launch("read_programs.py", cases, tmp_path)[0].read_text())

    def growth(schedule: str) -> float:
        """With every microbatch, in shares of a device's weights."""
        small, large = (found[f"{schedule}-{m}"]["held"] for m in (8, 16))
        return (large["gradients_temp"] - small["gradients_temp"]) / 8 / small["weights"]

    assert growth("1f1b") < 0.002
    assert 0.1 < growth("gpipe") < 0.6
    assert 0.1 < growth("interleaved") < 0.6


TIMELINES = [
    (plan, microbatches)
    for schedule, stages, microbatches in itertools.product(SCHEDULES, (2, 4, 8), (4, 8, 16, 32))
    for plan in [{"pipe": stages, "schedule": schedule}]
    if not (schedule == "interleaved" and microbatches % stages)
]


@pytest.fixture(scope="module")
def timelines(tmp_path_factory) -> list:
    cases = [{"plan": plan, "microbatches": microbatches} for plan, microbatches in TIMELINES]
    return json.loads(launch("read_timelines.py", cases, tmp_path_factory.mktemp("timelines"))[0].read_text())


def test_idle_slots_are_those_of_the_formula(timelines):
    for (plan, microbatches), stages in zip(TIMELINES, timelines, strict=True):
        assert bubble(worked(stages)) == expected_bubble(
            Plan.model_validate(plan), microbatches, BACKENDS["jax"]
        ), plan
        other = Plan.model_validate(plan | {"pipe": len(stages) + 1})
        assert bubble(worked(stages)) != expected_bubble(other, microbatches, BACKENDS["jax"]), (
            plan
        )  # control


def test_every_stage_does_all_its_work_and_has_what_it_needs(timelines):
    for (plan, microbatches), stages in zip(TIMELINES, timelines, strict=True):
        last = len(stages) - 1
        when = {
            (work, stage): slot
            for stage, slots in enumerate(worked(stages))
            for slot, work in enumerate(slots)
            if work is not None
        }
        chunks = Plan.model_validate(plan).chunks_per_stage
        assert len(when) == 2 * microbatches * chunks * len(stages)
        for (work, stage), slot in when.items():
            forward = Work("forward", work.microbatch, work.chunk)
            if work.kind == "backward":
                assert when[forward, stage] < slot
                after = (
                    (work, stage + 1)
                    if stage < last
                    else (Work("backward", work.microbatch, work.chunk + 1), 0)
                )
                assert when.get(after, -1) < slot
            elif stage > 0 or work.chunk > 0:
                before = (
                    (work, stage - 1) if stage else (Work("forward", work.microbatch, work.chunk - 1), last)
                )
                # What is handed on is there in the next slot of its kind, and is not kept for longer.
                assert slot - when[before] == (2 if plan["schedule"] == "1f1b" else 1)


def worked(stages: list) -> tuple:
    return tuple(tuple(work and Work(*work) for work in slots) for slots in stages)
