"""The plan's rules: what splits what, what is refused and what is said then."""

import math
from dataclasses import replace

import pytest
from small import SMALL

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.methods import LoRA, adapter_table
from trainspec.params import param_table
from trainspec.plans.capabilities import check_fits, check_supported
from trainspec.plans.plan import AUTO_LOGITS, Plan, local_size, weight_axes

ROWS = {p.name: p for p in param_table(replace(SMALL, attention_bias=True))}
ADAPTER = {p.name.split(".", 2)[2]: p for p in adapter_table(SMALL, LoRA(targets=("q_proj", "o_proj")))}
BASE = "model.layers.0.self_attn"
WIDE = Plan(data=2, fsdp=4, tensor=2, shards="params")


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("model.embed_tokens.weight", (("tensor",), ("fsdp",))),
        (f"{BASE}.q_proj.weight", (("tensor",), ("fsdp",))),
        (f"{BASE}.q_proj.bias", (("tensor", "fsdp"),)),  # no embed axis: behind tensor
        (f"{BASE}.o_proj.weight", (("fsdp",), ("tensor",))),
        (f"{BASE}.o_proj.bias", (("fsdp",),)),
        ("model.norm.weight", (("fsdp",),)),
        (f"{BASE}.q_proj.lora_A.weight", ((), ("fsdp",))),  # (rank, embed)
        (f"{BASE}.q_proj.lora_B.weight", (("tensor", "fsdp"), ())),  # (heads, rank)
        (f"{BASE}.o_proj.lora_A.weight", ((), ("tensor", "fsdp"))),  # (rank, heads)
        (f"{BASE}.o_proj.lora_B.weight", (("fsdp",), ())),  # (embed, rank)
    ],
)
def test_every_row_is_split_by_its_axes(name: str, axes):
    row = (ROWS | ADAPTER)[name]
    assert weight_axes(row, WIDE, over_fsdp=True) == axes
    without = tuple(tuple(a for a in dim if a != "fsdp") for dim in axes)
    assert weight_axes(row, WIDE, over_fsdp=False) == without
    assert local_size(row, WIDE, over_fsdp=False) * 2 ** str(without).count("tensor") == row.size


def test_axes_of_size_one_split_nothing():
    for row in ROWS.values():
        assert weight_axes(row, Plan(data=4), over_fsdp=True) == ((),) * len(row.shape)


def test_a_row_that_fsdp_does_not_divide_stays_whole():
    odd = ADAPTER[f"{BASE}.q_proj.lora_B.weight"]
    assert weight_axes(odd, Plan(fsdp=5, shards="params"), over_fsdp=True) == ((), ())


@pytest.mark.parametrize(
    ("shards", "split"),
    [
        ("nothing", set()),
        ("optimizer", {"optimizer"}),
        ("gradients", {"optimizer", "gradients"}),
        ("params", {"optimizer", "gradients", "weights"}),
    ],
)
def test_shards_are_the_stages_of_zero(shards, split):
    parts = ("weights", "gradients", "optimizer")
    assert {part for part in parts if Plan(fsdp=2, shards=shards).splits(part)} == split


@pytest.mark.parametrize(
    ("plan", "policy", "backends", "message"),
    [
        (Plan(microbatches=2), "fp32", "jax torch", "use plan.pipe=2 or more, or plan.microbatches=1"),
        (Plan(pipe=2), "fp64", "torch", "use precision.policy=fp32 .* plan.pipe=1 plan.microbatches=1"),
        (Plan(pipe=2, schedule="gpipe"), "fp32", "torch", "use plan.schedule=1f1b"),
        (Plan(pipe=2, data=2), "fp32", "torch", "use plan.fsdp=2 plan.data=1 plan.shards=optimizer"),
        (
            Plan(pipe=2, fsdp=2, shards="gradients"),
            "bf16",
            "torch",
            "use plan.shards=optimizer, or plan.pipe=1 .* plan.fsdp=4",
        ),
        (Plan(pipe=2, fsdp=2, shards="params"), "bf16", "torch", "no ZeRO stage above 1"),
        (Plan(shards="params"), "fp32", "jax torch", "use plan.shards=nothing"),
        (Plan(data=4, shards="params"), "fp32", "jax torch", "use plan.fsdp=4 plan.data=1"),
        (Plan(fsdp=2, shards="params"), "fp64", "torch", "DeepSpeed has no float64"),
        (Plan(data=2, fsdp=2), "bf16", "torch", "use plan.fsdp=4 plan.data=1 plan.shards=optimizer"),
    ],
)
def test_plans_that_cannot_work_name_one_that_does(plan: Plan, policy, backends: str, message: str):
    for backend in ("jax", "torch"):
        if backend in backends.split():
            with pytest.raises(PlanError, match=message):
                check_supported(plan, policy, BACKENDS[backend])
        else:
            check_supported(plan, policy, BACKENDS[backend])


def test_examples_that_do_not_divide_are_one_microbatch():
    plan = Plan(pipe=2, data=2, microbatches=4)
    assert [plan.microbatches_of(rows) for rows in (8, 16, 4, 10)] == [4, 4, 1, 1]
    assert Plan(data=2).microbatches_of(7) == 1


def test_a_loss_makes_as_many_logits_at_once_as_the_plan_says():
    assert [Plan(loss_chunk=n).positions_at_once(2, 48, 320) for n in (1, 7, 48, 50)] == [1, 7, 48, 48]


@pytest.mark.parametrize(
    ("plan", "rows", "vocab", "chunk"),
    [
        (Plan(), 4, 32_000, 512),  # the whole row of 512: 62.5 Mi logits
        (Plan(), 5, 32_000, 256),
        (Plan(tensor=2), 5, 32_000, 512),
        (Plan(), 1000, 128_256, 1),
    ],
)
def test_chunks_of_equal_length_make_64_mi_logits_at_most(plan: Plan, rows: int, vocab: int, chunk: int):
    assert plan.positions_at_once(rows, 512, vocab) == chunk
    logits_of_a_position = rows * vocab // plan.tensor
    assert chunk == 1 or chunk * logits_of_a_position <= AUTO_LOGITS
    # One chunk less would make more than that.
    assert chunk == 512 or math.ceil(512 / (512 // chunk - 1)) * logits_of_a_position > AUTO_LOGITS


def test_interleaved_microbatches_go_in_groups():
    plan, model = Plan(pipe=2, schedule="interleaved", microbatches=3), replace(SMALL, layers=5)
    with pytest.raises(PlanError, match=r"groups of plan.pipe=2, not 3; use plan.microbatches=4"):
        check_fits(plan, model, global_examples=6, accumulation=1, backend=BACKENDS["jax"])
    with pytest.raises(PlanError, match=r"into 6 model chunks; use plan.chunks=2"):
        check_fits(
            plan.model_copy(update={"chunks": 3}),
            model,
            global_examples=6,
            accumulation=1,
            backend=BACKENDS["jax"],
        )


@pytest.mark.parametrize(
    ("plan", "rows", "backends", "message"),
    [
        (Plan(tensor=4), 8, "jax torch", "cannot split kv_heads=2 of small; plan.tensor can be 1, 2"),
        (Plan(fsdp=5, shards="params"), 5, "jax", "cannot split embed=32 of small"),
        (
            Plan(data=3, fsdp=2),
            8,
            "jax torch",
            "16 cannot be split into 12 equal parts .* use batch.global_examples=24",
        ),
        (Plan(pipe=2, microbatches=3), 8, "jax torch", "plan.microbatches=3 .* use batch.global_examples=18"),
        (
            Plan(pipe=4),
            8,
            "jax torch",
            "small, which has 2 layers, into 4 model chunks; plan.pipe can be at most 2",
        ),
        (Plan(pipe=2, schedule="interleaved", microbatches=4), 8, "jax torch", "use plan.schedule=1f1b"),
    ],
)
def test_plans_that_do_not_divide_say_what_does(plan: Plan, rows: int, backends: str, message: str):
    for backend in ("jax", "torch"):
        sizes = {"global_examples": 2 * rows, "accumulation": 2}
        if backend in backends.split():
            with pytest.raises(PlanError, match=message):
                check_fits(plan, SMALL, **sizes, backend=BACKENDS[backend])
        else:
            check_fits(plan, SMALL, **sizes, backend=BACKENDS[backend])
