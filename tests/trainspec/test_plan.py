"""The plan's rules: what splits what, what is refused and what is said then, and how much a device holds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL

from trainspec.errors import PlanError
from trainspec.methods import Full, LoRA, adapter_table, trainable_table
from trainspec.model import PRESETS
from trainspec.params import param_table
from trainspec.plan import Plan, check_fits, check_supported, held_bytes, local_size, moved_bytes, weight_axes

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
        (Plan(pipe=2), "fp32", "jax torch", "use plan.pipe=1"),
        (Plan(microbatches=2), "fp32", "jax torch", "use plan.microbatches=1"),
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
                check_supported(plan, policy, backend)
        else:
            check_supported(plan, policy, backend)


@pytest.mark.parametrize(
    ("plan", "rows", "backends", "message"),
    [
        (Plan(tensor=4), 8, "jax torch", "cannot split kv_heads=2 of small; plan.tensor can be 1, 2"),
        (Plan(fsdp=5, shards="params"), 5, "jax", "cannot split embed=32 of small"),
        (Plan(data=3, fsdp=2), 8, "jax torch", "a microbatch of 8 rows .* use batch.global_examples=24"),
    ],
)
def test_plans_that_do_not_divide_say_what_does(plan: Plan, rows: int, backends: str, message: str):
    for backend in ("jax", "torch"):
        sizes = {"global_examples": 2 * rows, "accumulation": 2}
        if backend in backends.split():
            with pytest.raises(PlanError, match=message):
                check_fits(plan, SMALL, **sizes, backend=backend)
        else:
            check_fits(plan, SMALL, **sizes, backend=backend)


@pytest.mark.parametrize("shards", ["nothing", "optimizer", "gradients", "params"])
@pytest.mark.parametrize("devices", [4, 16, 64])
def test_held_bytes_are_the_table_of_zero(shards, devices: int):
    """Bytes per parameter with mixed-precision Adam: 16; 4 + 12/N; 2 + 14/N; 16/N (arXiv 1910.02054)."""
    rows = param_table(PRESETS["llama2-7b"])
    size = sum(p.size for p in rows)
    wanted = {
        "nothing": 16.0,
        "optimizer": 4 + 12 / devices,
        "gradients": 2 + 14 / devices,
        "params": 16 / devices,
    }
    for backend in ("jax", "torch"):
        held = held_bytes(
            Plan(fsdp=devices, shards=shards), trained=rows, frozen=(), policy="bf16", reduce="bf16", backend=backend
        )  # fmt: skip
        assert held.total / size == pytest.approx(wanted[shards], rel=1e-9)


def test_only_params_saves_memory_under_a_frozen_base():
    model = PRESETS["llama2-7b"]
    sizes = {}
    for shards in ("nothing", "gradients", "params"):
        held = held_bytes(
            Plan(fsdp=8, shards=shards), trained=trainable_table(model, LoRA()), frozen=param_table(model),
            policy="bf16", reduce="fp32", backend="jax",
        )  # fmt: skip
        sizes[shards] = held.total
    assert sizes["gradients"] > 0.98 * sizes["nothing"]
    assert sizes["params"] < 0.13 * sizes["nothing"]


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from(["params", "gradients", "optimizer"]),
)
def test_what_is_split_adds_up_to_the_whole(fsdp: int, tensor: int, shards):
    """On JAX: fsdp devices together hold the weights once where `params` are split, each all of them where not."""
    rows = trainable_table(SMALL, Full())
    plan = Plan(fsdp=fsdp, tensor=tensor, shards=shards)
    held = held_bytes(plan, trained=rows, frozen=(), policy="fp32", reduce="fp32", backend="jax")
    per_rank = sum(local_size(p, plan, over_fsdp=False) for p in rows) * 4
    copies = fsdp if shards == "params" else 1
    assert held.weights * copies == per_rank
    assert held.moments * fsdp == 2 * per_rank


@pytest.mark.parametrize(
    ("shards", "psi"), [("nothing", 2), ("optimizer", 2), ("gradients", 2), ("params", 3)]
)
def test_moved_bytes_are_the_papers(shards, psi: int):
    rows = param_table(PRESETS["llama2-7b"])
    size = 2 * sum(p.size for p in rows)
    for backend in ("jax", "torch"):
        moved = moved_bytes(
            Plan(fsdp=64, shards=shards), trained=rows, frozen=(), policy="bf16", reduce="bf16", accumulation=1,
            backend=backend,
        )  # fmt: skip
        assert moved.total == pytest.approx(psi * size * 63 / 64)


def test_frozen_weights_travel_only_where_they_are_split():
    model = PRESETS["llama2-7b"]
    rows = {"trained": trainable_table(model, LoRA()), "frozen": param_table(model)}
    moved = {
        shards: moved_bytes(
            Plan(fsdp=8, shards=shards), **rows, policy="bf16", reduce="bf16", accumulation=1, backend="torch"
        )
        for shards in ("gradients", "params")
    }
    assert moved["gradients"].total < 0.01 * moved["params"].total
    assert moved["gradients"].gradients == moved["params"].gradients
