"""Decoding with a cache gives the logits of whole rows: methods that have moved, windows, virtual tokens, types, plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded import apart, moved
from plan_cases import PRECISION, Case, case
from plan_runs import Make, recipe_of
from ranks import run

from torchtrain import decoding, step
from torchtrain.attention.cache import OneToken
from torchtrain.cluster import start
from torchtrain.methods import prefix
from torchtrain.step import State
from trainspec.data import open_dataset
from trainspec.generation.rows import batch_of

ROUNDING = 1e-13  # of the largest logit, in float64
LORA = {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.2, "targets": "all-linear"}
DORA = {"kind": "dora", "rank": 3, "alpha": 5.0, "targets": ["q_proj", "k_proj", "v_proj", "lm_head"]}
PREFIX = {"kind": "prefix", "virtual_tokens": 3}
PROJECTED = {"kind": "prefix", "virtual_tokens": 3, "projection": True, "hidden": 8}
PROMPT = {"kind": "prompt", "virtual_tokens": 3}
FROM_ZERO = {"kind": "prefix", "virtual_tokens": 3, "positions": "from_zero", "dropout": 0.25}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA in fused layers": ("chatglm2", LORA),
    "a prefix without positions": ("chatglm2", FROM_ZERO),
    "a prefix in a window": ("mistral", PREFIX),
    "a prefix without positions in a window": ("mistral", FROM_ZERO),
    "a prompt in a window": ("mistral", PROMPT),
    "a prompt and a layer that is not rotated": ("smollm3", PROMPT),
    "lengths of DoRA, with biases": ("bias", DORA),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("plain", LORA),
    "bottleneck": ("qwen3", {"kind": "adapter", "bottleneck": 4}),
    "projected prefix": ("glm", PROJECTED),
    "prefix, projected as published": (
        "chatglm2",
        FROM_ZERO | {"projection": True, "projected": "all_layers"},
    ),
    "P-tuning": ("mistral", {"kind": "ptuning", "virtual_tokens": 3, "hidden": 8}),
    "LSTM": ("qwen2", {"kind": "ptuning", "virtual_tokens": 3, "hidden": 8, "encoder": "lstm"}),
    "linear RoPE": ("linear-rope", LORA),
    "Llama 3's RoPE, prefix": ("llama3-rope", PREFIX),
    "YaRN's RoPE, prompt": ("yarn-rope", PROMPT),
    "full": ("tied", {"kind": "full"}),
}


def begun(make_recipe: Callable[..., Any], which: str, precision: str = "fp64", **plan: Any) -> State:
    variant, method = (CASES | MORE)[which]
    recipe = make_recipe(variant, method=method, precision=PRECISION[precision], plan=plan)
    return moved(step.init_state(start(recipe)))


@pytest.mark.parametrize("which", [*CASES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_a_cache_is_the_whole_rows(make_recipe, which: str):
    assert apart(begun(make_recipe, which)) < ROUNDING


@pytest.mark.parametrize("attention", ["fused", pytest.param("reference", marks=pytest.mark.full)])
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_a_cache_in_other_types(make_recipe, precision: str, rounding: float, attention: str):
    found = apart(begun(make_recipe, "a prompt in a window", precision, attention=attention))
    assert 0 < found < rounding


def earlier_slot(token: OneToken) -> OneToken:
    """Each key over that of the token before."""
    return replace(token, slots_B=token.slots_B - 1)


def no_virtual_tokens(token: OneToken) -> OneToken:
    """The first three keys hidden."""
    assert token.mask_B11X is not None
    mask_B11X = token.mask_B11X.clone()
    mask_B11X[..., :3] = -torch.inf
    return replace(token, mask_B11X=mask_B11X)


def no_mask(token: OneToken) -> OneToken:
    """A short row sees what padding has left, and all see what has left the window."""
    return replace(token, mask_B11X=None)


@pytest.mark.parametrize("wrong", [earlier_slot, no_virtual_tokens, no_mask])
def test_a_mistake_is_seen(make_recipe, monkeypatch, wrong: Callable[[OneToken], OneToken]):
    """Negative control of the comparison, beginning with what is right."""
    state, right = begun(make_recipe, "a prefix without positions in a window"), decoding.one_token
    monkeypatch.setattr(decoding, "one_token", lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    assert apart(state) > 1e-4


def test_a_wrong_position_is_seen(make_recipe, monkeypatch):
    state = begun(make_recipe, "a prompt in a window")
    monkeypatch.setattr(decoding, "position_shift", lambda method: method.position_shift + 1)
    assert apart(state) > 1e-4


@pytest.mark.parametrize("which", ["a prefix in a window", "a prompt in a window"])
def test_an_update_after_decoding_is_the_one_without(make_recipe, which: str):
    """A pass over one more token leaves nothing: the next one that begins rows makes its virtual tokens."""
    losses = []
    for decodes in (True, False):
        state = begun(make_recipe, which)
        if decodes:
            apart(state)
        batch = open_dataset(state.run, "train").batch(4, 4)
        state, metrics = step.train_step(state, batch, lr=1e-3)
        losses += [metrics.loss_sum, metrics.grad_norm, step.eval_step(state, batch)[0]]
    assert losses[:3] == losses[3:]


def test_a_training_pass_that_loses_its_prefix_is_seen(make_recipe, monkeypatch):
    """It would train without one."""
    state = begun(make_recipe, "a prefix in a window")
    monkeypatch.setattr(prefix, "layer_inputs", lambda *args, **kwargs: {})
    batch = open_dataset(state.run, "train").batch(4, 4)
    with pytest.raises(AssertionError, match="has its prefix"):
        step.train_step(state, batch, lr=1e-3)


def test_a_row_is_the_same_in_any_batch(make_recipe):
    """Alone no row needs a mask: all keys that are there are seen."""
    state = begun(make_recipe, "LoRA in fused layers")
    cached = step.decoding(state, length=12)
    assert cached is not None
    found = []
    for rows in ([[1, 7, 9]], [[1, 7, 9], [1, 4, 6, 7, 30, 9]]):
        batch, last = batch_of(rows, limit=64, count=len(rows))
        first = cached.begin(batch, last)[0]
        found.append([first, *(cached.extend(np.array([id_] * len(rows)))[0] for id_ in (20, 21, 22))])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert not np.allclose(found[0][1], found[0][2])


# DeepSpeed has no float64.
PLANS = [
    case("wide", "lora", "fp64", tensor=2),
    case("wide", "prefix", "fp64", tensor=2),
    case("tied", "ptuning-mlp", "fp64", data=2),
    case("qwen3", "dora", "fp64", tensor=2),
    case("tied", "full", "fp32", fsdp=2, shards="optimizer"),
    case("wide", "lora", "bf16", fsdp=2, shards="gradients"),
    case("wide", "full", "fp32", fsdp=2, shards="params"),
    case("wide", "lora-head", "fp32", fsdp=2, shards="params", remat="full"),
    case("wide", "prefix-projection", "fp32", fsdp=2, shards="params"),
    case("tied", "prompt", "bf16", fsdp=2, shards="params"),
    case("wide", "prompt", "fp64", data=2, tensor=2),
    case("tied", "full", "fp64", data=2, tensor=2),
    case("wide", "prefix", "fp32", fsdp=2, tensor=2, shards="params"),
]
BOUNDS = {"fp64": ROUNDING, "fp32": 1e-5, "bf16": 0.05}
PIPE = case("deep", "full", "fp32", pipe=2, microbatches=2)


@pytest.fixture(scope="module")
def launched(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """What the processes of each case found, launched once for each number of them."""
    home, found = tmp_path_factory.mktemp("decoding"), {}
    for processes in (2, 4):
        cases = [c for c in (*PLANS, PIPE) if c.processes == processes]
        files = []
        for i, c in enumerate(cases):
            files.append(str(home / f"{processes}-{i}.yaml"))
            Path(files[-1]).write_text(recipe_of(make, c).to_yaml())
        run(Path(__file__).with_name("probe_decoding.py"), files, home / str(processes), processes=processes)
        found |= zip(cases, json.loads((home / f"{processes}/results.json").read_text()), strict=True)
    return found


@pytest.mark.full(minutes=4)
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_a_cache_under_a_plan_is_the_whole_rows(launched: dict[Case, dict[str, Any]], case: Case):
    found = launched[case]
    assert found["is cached"]
    assert found["apart"] < BOUNDS[case.precision]
    assert found["apart of a wrong position"] > 2 * BOUNDS[case.precision]  # control
    assert found["same on all"]
    assert found["update after"] == found["update"]


@pytest.mark.full(minutes=4)
def test_a_pipeline_has_none(launched: dict[Case, dict[str, Any]]):
    assert not launched[PIPE]["is cached"]
