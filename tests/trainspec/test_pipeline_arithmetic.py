"""Which layers a stage holds, and the arithmetic of what a schedule leaves unused."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.methods import LoRA, PrefixTuning, PromptTuning, PTuning, adapter_table
from trainspec.params import param_table
from trainspec.plans.capabilities import check_trains, expected_bubble
from trainspec.plans.pipeline import (
    Work,
    bubble,
    partition_layers,
    stack_order,
    stages_of,
)
from trainspec.plans.plan import Plan

FIVE = replace(SMALL, layers=5)


def test_layers_are_split_evenly_the_first_pieces_longer():
    assert partition_layers(5, 2) == (range(3), range(3, 5))
    assert partition_layers(5, 4) == (range(2), range(2, 3), range(3, 4), range(4, 5))


@given(st.integers(1, 90), st.integers(1, 12))
def test_every_layer_is_in_one_chunk(layers: int, chunks: int):
    found = partition_layers(layers, chunks)
    assert [i for chunk in found for i in chunk] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    ("plan", "order"),
    [
        (Plan(), (0, 1, 2, 3, 4)),
        (Plan(pipe=2), (0, 1, 2, 3, 4, None)),
        (Plan(pipe=4), (0, 1, 2, None, 3, None, 4, None)),
        # The first stage has the first and the third chunk, layers 0, 1 and 3: the first layer of each, then the second.
        (Plan(pipe=2, schedule="interleaved"), (0, 3, 1, None, 2, 4, None, None)),
    ],
)
def test_the_stack_has_a_stages_chunks_together(plan: Plan, order):
    assert stack_order(plan, 5) == order


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_stack_and_stages_agree(layers: int, pipe: int, chunks: int):
    """A layer's position in JAX's stack is on the stage that computes with its weights in torch."""
    plan = Plan(pipe=pipe, schedule="interleaved", chunks=chunks)
    model = replace(SMALL, layers=layers)
    order = stack_order(plan, layers)
    per_stage = len(order) // pipe
    for param in param_table(model):
        if param.layer is not None:
            assert stages_of(param, plan, model) == (order.index(param.layer) // per_stage,)


def test_what_is_not_in_a_layer_is_on_the_first_or_the_last_stage():
    plan = Plan(pipe=2)
    rows = {p.name: p for p in (*param_table(FIVE), *adapter_table(FIVE, LoRA(targets=("lm_head",))))}
    assert stages_of(rows["model.embed_tokens.weight"], plan, FIVE) == (0,)
    assert stages_of(rows["model.embed_tokens.weight"], plan, replace(FIVE, tied_embeddings=True)) == (0, 1)
    assert stages_of(rows["model.embed_tokens.weight"], Plan(), replace(FIVE, tied_embeddings=True)) == (0,)
    assert stages_of(rows["model.norm.weight"], plan, FIVE) == (1,)
    assert stages_of(rows["base_model.model.lm_head.lora_A.weight"], plan, FIVE) == (1,)


def test_each_stage_makes_the_prefix_and_only_the_first_the_prompt():
    plan = Plan(pipe=2)
    for method in (PrefixTuning(), PrefixTuning(projection=True, hidden=4)):
        assert {stages_of(p, plan, FIVE) for p in adapter_table(FIVE, method)} == {(0, 1)}
    for method in (PromptTuning(), PTuning(), PTuning(encoder="lstm", hidden=4)):
        assert {stages_of(p, plan, FIVE) for p in adapter_table(FIVE, method)} == {(0,)}


def test_a_first_stage_that_trains_nothing_is_refused():
    last_layer = adapter_table(FIVE, LoRA(targets="model.layers.4.self_attn.q_proj"))
    with pytest.raises(PlanError, match="stage 0 trains nothing"):
        check_trains(Plan(pipe=2), FIVE, last_layer, BACKENDS["torch"])
    for method in (LoRA(), LoRA(targets="model.layers.0.self_attn.q_proj"), PromptTuning()):
        check_trains(Plan(pipe=2), FIVE, adapter_table(FIVE, method), BACKENDS["torch"])
    check_trains(Plan(), FIVE, last_layer, BACKENDS["torch"])


def test_a_bubble_is_counted():
    first, second = Work("forward", 0), Work("backward", 0)
    assert bubble(((first, None, None, second), (None, first, second, None))) == Fraction(1, 2)


@pytest.mark.parametrize(
    ("plan", "microbatches", "backend", "share"),
    [
        (Plan(pipe=4, schedule="gpipe"), 16, "jax", Fraction(3, 19)),
        (Plan(pipe=4, schedule="interleaved"), 16, "jax", Fraction(3, 35)),
        (Plan(pipe=4), 16, "jax", Fraction(6, 22)),
        (Plan(pipe=4), 16, "torch", Fraction(3, 19)),
        (Plan(), 1, "torch", 0),
    ],
)
def test_the_formulas_of_the_papers(plan: Plan, microbatches: int, backend, share):
    assert expected_bubble(plan, microbatches, BACKENDS[backend]) == share
