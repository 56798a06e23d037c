"""DoRA against PEFT's own: the same loss and gradients, merged weights, and the run of one process under every plan."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from plan_cases import case
from plan_runs import APART, Make, check, recipe_of, run_cases, traces
from ranks import furthest, run_all, traced
from safetensors.numpy import load_file
from torch import nn

from parity.runs.edit import Edit
from torchtrain.attention.visible import Visible, rows_of
from torchtrain.cluster import start
from torchtrain.dropout import CounterDropout
from torchtrain.step import State, init_state
from torchtrain.weights import canonical_name
from trainspec.files.adapters import write_adapter
from trainspec.files.hf import resolve_model
from trainspec.init import initial_value
from trainspec.methods import DoRA
from trainspec.params import Normal, param_table

ROUNDING = 1e-13  # of a tensor's largest number, in float64
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj", "lm_head")
# Split weights and pipelines are in test_torch_methods.py.
PLANS = [
    case("tied", "dora", "fp64", tensor=2, remat="full"),
    case("tied", "dora", "fp64", data=2),
    case("wide", "dora", "bf16", tensor=2),
]


def started(make: Callable[..., Any], tmp_path: Path, **settings: Any) -> State:
    """A run in float64 from an adapter that is drawn, lengths included."""
    method = DoRA(rank=3, alpha=5.0, targets=TARGETS, **settings)
    recipe = make("bias", method=method.model_dump(), precision={"policy": "fp64", "reduce": "fp64"})
    spec = resolve_model(recipe.model)[0]
    weights = {
        p.name: initial_value(replace(p, init=Normal(0.3)), seed=4, dtype="float64")
        for p in method.table(spec)
    }
    write_adapter(tmp_path / "a", weights, model=spec, method=method, base="x")
    method = method.model_copy(update={"adapter": str(tmp_path / "a")})
    recipe = recipe.model_copy(update={"method": method})
    return init_state(start(recipe))


def pefts(state: State) -> nn.Module:
    """The same model with PEFT's DoRA, which has the weights and the dropout of `state`."""
    method: Any = state.run.recipe.method
    model: Any = deepcopy(state.model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            model.set_submodule(name, module.base_layer)
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, target_modules=list(TARGETS), use_dora=True,
        lora_dropout=method.dropout,
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    mine, own = dict(state.model.named_parameters()), dict(model.named_parameters())
    assert set(mine) == set(own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(mine[name])
            parameter.requires_grad_(mine[name].requires_grad)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and method.dropout:
            dropout = CounterDropout(
                name, seed=state.run.recipe.run.seed, rate=method.dropout, point=state.point
            )
            module.lora_dropout["default"] = dropout
    return model


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 27).reshape(2, 12)
    positions, segments = torch.arange(12).expand(2, 12), torch.ones(2, 12)
    rows = rows_of(segments.numpy(), positions.numpy())
    visible = Visible(segments_BT=segments, positions_BT=positions, rows=rows)
    logits = model(input_ids=ids, position_ids=positions, visible=visible).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), (ids + 1).flatten())
    loss.backward()
    trained = {canonical_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: grad for name, grad in trained.items() if grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_are_those_of_pefts_dora(
    make_recipe: Callable[..., Any], tmp_path: Path, dropout: float, training: bool
):
    state = started(make_recipe, tmp_path, dropout=dropout)
    state.point.rows = torch.arange(2, dtype=torch.int32)
    theirs = pefts(state)
    (loss, gradients), (their_loss, their_gradients) = (
        loss_and_gradients(model.train(training)) for model in (state.model, theirs)
    )
    assert loss == pytest.approx(their_loss, rel=ROUNDING)
    assert set(gradients) == set(their_gradients)
    assert len(gradients) == 3 * (4 * state.run.spec.layers + 1)
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() <= ROUNDING * gradient.abs().max(), name


def test_a_start_has_pefts_magnitudes(make_recipe: Callable[..., Any]):
    """B is zero, so that the magnitude is the norm of each row of W, and the model is unchanged."""
    method = {"kind": "dora", "rank": 3, "targets": ["q_proj", "down_proj"]}
    recipe = make_recipe("bias", method=method, precision={"policy": "fp64", "reduce": "fp64"})
    state = init_state(start(recipe))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    base = [name for name in before if name.endswith("base_layer.weight")]
    assert len(base) == 2 * state.run.spec.layers
    for name in base:
        magnitude = before[name.replace("base_layer", "lora_magnitude_vector.default")]
        torch.testing.assert_close(magnitude, before[name].norm(dim=1), rtol=1e-14, atol=0)


def test_what_is_merged_is_what_peft_merges(make_recipe: Callable[..., Any], tmp_path: Path):
    state = started(make_recipe, tmp_path)
    method: Any = state.run.recipe.method
    trained = {
        canonical_name(name): parameter.detach().numpy() for name, parameter in state.model.named_parameters()
    }
    theirs: Any = pefts(state)
    for name, module in list(theirs.named_modules()):
        if not hasattr(module, "base_layer"):
            continue
        module.merge(safe_merge=True)
        (param,) = (p for p in param_table(state.run.spec) if p.name == f"{name}.weight")
        merged = method.merged(param, trained[param.name], trained)
        np.testing.assert_allclose(
            merged, module.base_layer.weight.detach().numpy(), rtol=1e-12, atol=1e-15, err_msg=name
        )
        assert np.abs(merged - trained[param.name]).max() > 1e-2


def test_files_have_pefts_names(make_recipe: Callable[..., Any], tmp_path: Path):
    started(make_recipe, tmp_path)
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in names


# A mistake each, the plan under which it is one, and the quantity that shows it.
PLANTED = {
    "each peer with the norms of its own inputs": (
        case("tied", "dora", "fp64", tensor=2, remat="full"),
        Edit("torchtrain.methods.dora:Magnitude._norms", "__peers.sum_(__squares)", "__squares"),
        "activation",
    ),
    "the change is of x, not of what dropout leaves": (
        case("tied", "dora", "fp64", data=2),
        Edit(
            "torchtrain.methods.dora:_Variant.forward",
            "base(__dropped) if __drops else __result",
            "__result",
        ),
        "activation",
    ),
}


@pytest.fixture(scope="module")
def launched(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = run_cases(make, tmp_path_factory.mktemp("dora"), PLANS, [], [])
    commands = [traced(recipe_of(make, case), home / name, edit) for name, (case, edit, _) in PLANTED.items()]
    run_all(commands, home / "planted", processes=2)
    return home


@pytest.mark.full(minutes=1.5)
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_a_plan_gives_the_run_of_one_process(launched: Path, case):
    check(*traces(launched, case), case.precision)


@pytest.mark.full(minutes=1.5)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_is_seen(launched: Path, fault: str):
    """Negative control: the same comparison, with one line of the product changed."""
    case, _, group = PLANTED[fault]
    left, right = traces(launched, case)[0], launched / fault / "trace"
    assert furthest(left, right, group, step=1) > 1e-2
    with pytest.raises(AssertionError, match=APART):
        check(left, right, case.precision)
