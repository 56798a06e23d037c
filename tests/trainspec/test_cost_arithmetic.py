"""The arithmetic of memory and traffic, against the tables of ZeRO's paper; the twins' tests hold it to measurements."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL

from trainspec.backends import BACKENDS
from trainspec.families import PRESETS
from trainspec.methods import LoRA, trainable_table
from trainspec.params import param_table
from trainspec.plans.cost import Collective, Cost
from trainspec.plans.plan import Backend, Plan, Policy, local_size

SEVEN = PRESETS["llama2-7b"]
ROWS = param_table(SEVEN)
SIZE = sum(p.size for p in ROWS)
SHARDS = ("nothing", "optimizer", "gradients", "params")


def cost(
    plan: Plan, backend: Backend, *, model=SEVEN, rows=ROWS, frozen=(), policy: Policy = "bf16", reduce: Policy = "bf16", accumulation=1
) -> Cost:  # fmt: skip
    return BACKENDS[backend].cost(model, plan, policy, reduce, accumulation, tuple(rows), tuple(frozen))


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("devices", [4, 16, 64])
@pytest.mark.parametrize(
    ("shards", "wanted"),
    [
        ("nothing", lambda n: 16),
        ("optimizer", lambda n: 4 + 12 / n),
        ("gradients", lambda n: 2 + 14 / n),
        ("params", lambda n: 16 / n),
    ],
)
def test_held_bytes_are_the_papers(backend: Backend, devices: int, shards, wanted):
    """Bytes per parameter with mixed-precision Adam."""
    held = cost(Plan(fsdp=devices, shards=shards), backend).memory_use()
    assert held.total / SIZE == pytest.approx(wanted(devices), rel=1e-9)


def test_only_params_saves_memory_under_a_frozen_base():
    lora = {"rows": trainable_table(SEVEN, LoRA()), "frozen": ROWS}
    sizes = {s: cost(Plan(fsdp=8, shards=s), "jax", **lora).memory_use().total for s in SHARDS}
    assert sizes["gradients"] > 0.98 * sizes["nothing"]
    assert sizes["params"] < 0.13 * sizes["nothing"]


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from(SHARDS[1:]))
def test_what_is_split_adds_up_to_the_whole(fsdp: int, tensor: int, shards):
    """On JAX: fsdp devices together hold the weights once where `params` are split, each all of them where not."""
    rows = param_table(SMALL)
    plan = Plan(fsdp=fsdp, tensor=tensor, shards=shards)
    held = cost(plan, "jax", model=SMALL, rows=rows, policy="fp32", reduce="fp32").memory_use()
    per_rank = sum(local_size(p, plan, over_fsdp=False) for p in rows) * 4
    copies = fsdp if shards == "params" else 1
    assert held.weights * copies == per_rank
    assert held.moments * fsdp == 2 * per_rank


def test_a_stage_holds_its_layers():
    """Two stages of two layers each: torch's first has the embedding, on JAX each has embedding, norm and head."""
    model = replace(SMALL, layers=4)
    rows = param_table(model)
    plan = Plan(pipe=2, microbatches=2)
    layer = sum(p.size for p in rows if p.layer == 0)
    ends = sum(p.size for p in rows if p.layer is None)
    exact = {"model": model, "rows": rows, "policy": "fp32", "reduce": "fp32"}
    assert cost(plan, "jax", **exact).memory_use().weights == 4 * (2 * layer + ends)
    found = cost(plan, "torch", **exact).memory_use()
    last = ends - rows[0].size
    assert found.weights == 4 * (2 * layer + max(rows[0].size, last))
    assert found.master == found.weights  # DeepSpeed's pipeline runs stage 1
    # A stage of JAX's is as long as the longest: 2 places for 1.5 layers.
    three = replace(SMALL, layers=3)
    uneven = exact | {"model": three, "rows": param_table(three)}
    assert cost(plan, "jax", **uneven).memory_use().weights == 4 * (2 * layer + ends)
    with pytest.raises(ValueError, match="pipeline"):
        cost(plan, "jax", **exact).traffic()


@pytest.mark.parametrize(
    ("shards", "backend", "psi"),
    [
        ("nothing", "torch", 2),
        ("optimizer", "torch", 2),
        ("gradients", "torch", 2),
        ("params", "torch", 3),
        ("nothing", "jax", 2),
        ("optimizer", "jax", 3),  # whole gradients, then weights
        ("gradients", "jax", 2),
        ("params", "jax", 3),
    ],
)
def test_moved_bytes_are_the_papers(shards, backend: Backend, psi: int):
    found = cost(Plan(fsdp=64, shards=shards), backend, policy="fp32", reduce="fp32").traffic().total
    table = 4 * ROWS[0].size * 63 / 64  # JAX gathers the embedding once
    saved = table if (shards, backend) == ("params", "jax") else 0
    assert found == pytest.approx(psi * 4 * SIZE * 63 / 64 - saved)


def test_microbatches_are_reduced_one_by_one_where_gradients_are_split_and_on_jax():
    def times(shards, backend: Backend) -> float:
        one, four = (
            cost(Plan(fsdp=4, shards=shards), backend, accumulation=n).traffic().gradients for n in (1, 4)
        )
        return four / one

    assert [times(s, "torch") for s in SHARDS] == [1, 1, 4, 4]
    assert [times(s, "jax") for s in SHARDS] == [4, 4, 4, 4]


def test_frozen_weights_travel_only_where_they_are_split():
    lora = {"rows": trainable_table(SEVEN, LoRA()), "frozen": ROWS}
    some, all_ = (cost(Plan(fsdp=8, shards=s), "torch", **lora).traffic() for s in ("gradients", "params"))
    assert some.total < 0.01 * all_.total
    assert some.gradients == all_.gradients


def test_a_data_axis_beside_fsdp_is_one_sum_on_jax():
    plan = Plan(data=2, fsdp=2, shards="gradients")
    jax, torch = (cost(plan, b, policy="fp32", reduce="fp32").traffic().gradients for b in ("jax", "torch"))
    assert jax == 2 * torch == 2 * 4 * SIZE * 3 / 4


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 150),
        ("all-gather", 75),
        ("reduce-scatter", 75),
        ("reduce", 75),
        ("collective-permute", 100),
    ],
)
def test_a_ring_sends(kind: str, sent: float):
    assert Collective("step", kind, "f32", 100, devices=4, times=3).sent_bytes == 3 * sent
