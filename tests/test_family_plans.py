"""Families on several devices.

Qwen3's norms of heads are whole on every tensor peer, and each peer sees only its own heads; GLM's matrix of gate and up is
split in both of its halves; a stage of a pipeline knows which of its layers rotate; a window is the same wherever rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from asked import asked_for
from small import recipe_maker

from parity.check import check
from parity.diff import diff
from parity.report.verdict import Verdict
from parity.runs.launch_many import Case, run_cases, training
from parity.runs.sides import parse_side
from trainspec.plans.plan import Backend, Policy
from trainspec.recipe import Recipe, load_recipe

Make = Callable[..., Recipe]
FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["q_proj"]}
# P-Tuning v2 as published with ChatGLM2. A peer draws the masks of its own heads, a stage those of its own layers.
PUBLISHED = {
    "kind": "prefix", "virtual_tokens": 3, "positions": "from_zero", "dropout": 0.2, "projection": True, "projected": "all_layers",
}  # fmt: skip
# One A of queries, keys and values, which peers and stages hold once.
TIED = LORA | {"targets": ["query_key_value", "dense_4h_to_h"], "dropout": 0.1}
GATE_AND_UP = LORA | {"targets": ["gate_up_proj", "down_proj"]}
PIPE = "plan.pipe=2 plan.microbatches=2"
PARAMS = "plan.fsdp=2 plan.shards=params"


class Twins(NamedTuple):
    family: str
    method: dict[str, Any]
    left: str
    right: str
    precision: Policy


# Every family under every kind of plan is in `parity matrix`; here is what it has not: norms of heads split in two ways at once,
# a window on replicas, a published prefix and a tied A under recomputation, replicas and several axes.
TWINS = {
    "norms of heads": Twins("qwen3", FULL, f"jax plan.tensor=2 {PARAMS}", f"torch plan.tensor=2 {PARAMS}", "fp32"),
    "a window": Twins("mistral", FULL, "jax plan.data=2", "torch plan.data=2", "fp64"),
    "gate and up": Twins("glm", GATE_AND_UP, "jax plan.tensor=2", "torch plan.tensor=2", "fp64"),
    "prefix in stages": Twins("chatglm2", PUBLISHED, f"jax {PIPE} plan.remat=full", "torch plan.data=2", "fp64"),
    "prefix of peers": Twins("chatglm2", PUBLISHED, "jax plan.data=2 plan.tensor=2", f"torch plan.tensor=2 {PARAMS}", "bf16"),
    "one A of peers": Twins("chatglm2", TIED, "jax plan.tensor=2", "torch plan.tensor=2", "fp64"),
    "one A in stages": Twins("chatglm2", TIED, f"jax {PIPE} plan.remat=full", "torch plan.data=2", "fp64"),
    "one A in stages of both": Twins("chatglm2", TIED, f"jax {PIPE}", f"torch {PIPE}", "fp32"),
    "one A of split weights": Twins("chatglm2", TIED, f"jax {PARAMS}", f"torch plan.tensor=2 {PARAMS}", "bf16"),
}  # fmt: skip
# On torch, a tensor peer that keeps the gradient of its own heads.
NOT_SUMMED = """
import torchtrain.tensor_parallel
from torch.func import functional_call
torchtrain.tensor_parallel.HeadNorm.forward = lambda self, x: functional_call(self._norm[0], {"weight": self.weight}, (x,))
"""


def plant(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every Python process that a check starts run `code` first."""
    (directory / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{directory}:{Path.cwd()}")


def recipe_of(make: Make, family: str, method: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    optimizer = {"lr": 1e-3, "clip_norm": 0.5, "weight_decay": 0.1}
    return make(family, method=method, optimizer=optimizer, **sections)


@pytest.fixture(scope="module")
def trained(
    model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The traces of `TWINS` that are asked for, NAME/left and NAME/right: one launch for each number of processes."""
    home, make = tmp_path_factory.mktemp("families"), recipe_maker(model_dirs)
    cases: dict[Backend, list[Case]] = {}
    for name in asked_for(request, "name"):
        family, method, *sides, precision = TWINS[name]
        types = {"policy": precision, "reduce": "fp32" if precision == "bf16" else precision}
        recipe = recipe_of(make, family, method, precision=types, run={"steps": 2})
        for which, side in zip(("left", "right"), map(parse_side, sides), strict=True):
            (home / name).mkdir(exist_ok=True)
            file = home / name / f"{which}.yaml"
            file.write_text(recipe.to_yaml())
            resolved = load_recipe(file, side.overrides)
            file.write_text(resolved.to_yaml())
            case = training(file, home / name / which, devices=resolved.plan.devices)
            cases.setdefault(side.backend, []).append(case)
    for backend, some in cases.items():
        for case, ended in zip(some, run_cases(backend, some, home=home / "launches"), strict=True):
            assert ended.wrong is None, f"{case.argv}: {ended.wrong}"
    return home


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("name", TWINS)
def test_a_plan_changes_nothing(trained: Path, tmp_path: Path, name: str):
    traces = (trained / name / side / "trace" for side in ("left", "right"))
    precision = TWINS[name].precision
    verdict = diff(*traces, precision=precision, out=tmp_path)
    assert verdict.holds, verdict.lines(colour=False)
    assert verdict.comparison.steps == 2
    if precision == "fp64":
        assert verdict.comparison.notes == ()  # both traces say their causal order


def checked(
    make: Make, home: Path, left: str, right: str, precision: Policy, method: dict, *, family: str = "qwen3"
) -> Verdict:
    (home / "recipe.yaml").write_text(recipe_of(make, family, method).to_yaml())
    return check(
        home / "recipe.yaml", left=parse_side(left), right=parse_side(right), precision=precision, steps=2,
        overrides=(), out=home / "check",
    )  # fmt: skip


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [PUBLISHED, TIED], ids=["published prefix", "one A"])
def test_what_chatglm2_alone_has_is_within_measured_bounds(
    make_recipe: Make, tmp_path: Path, method: dict[str, Any], precision: Policy
):
    verdict = checked(make_recipe, tmp_path, "jax", "torch", precision, method, family="chatglm2")
    assert verdict.holds, verdict.lines(colour=False)
    assert verdict.comparison.steps == 2
    assert not verdict.comparison.unproven


@pytest.mark.full
def test_an_a_that_learns_of_queries_alone_is_seen(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Control: keys and values use A, and their part of its gradient is lost."""
    plant(
        "import torch, torchtrain.layers\n"
        "from torch.func import functional_call\n"
        "torchtrain.layers.TiedLinear.forward = lambda self, x: functional_call(\n"
        "    self.source, {'weight': self.weight.detach()}, (x,)\n"
        ")\n",
        tmp_path,
        monkeypatch,
    )
    verdict = checked(make_recipe, tmp_path, "jax", "torch", "fp64", TIED, family="chatglm2")
    first = verdict.comparison.first_divergence
    assert first is not None
    assert first.location.phase == "gradient"
    assert first.location.tensor.endswith("self_attn.q_proj.lora_A.weight")


@pytest.mark.full
def test_masks_of_another_peer_s_heads_are_seen(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Control: with the masks of the first heads on every peer, the values of the first layer's prefix differ."""
    plant(
        "import torchtrain.methods.prefix as prefix\n"
        "made = prefix.CounterDropout\n"
        "def first(name, *, seed, rate, point):\n"
        "    point.first_feature[name] = 0\n"
        "    return made(name, seed=seed, rate=rate, point=point)\n"
        "prefix.CounterDropout = first\n",
        tmp_path,
        monkeypatch,
    )
    verdict = checked(
        make_recipe, tmp_path, "torch", "torch plan.tensor=2", "fp64", PUBLISHED, family="chatglm2"
    )
    first = verdict.comparison.first_divergence
    assert first is not None
    assert (first.location.phase, first.location.tensor) == ("activation", "layers.0.prefix_key")


@pytest.mark.full
def test_halves_that_are_split_as_one_are_seen(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Control: with a contiguous half of gate and up, one peer has all of gate and the other all of up."""
    plant(
        "import torchtrain.tensor_parallel, torchtrain.weights\n"
        "torchtrain.tensor_parallel.PARTS = torchtrain.weights.PARTS = {}\n",
        tmp_path,
        monkeypatch,
    )
    verdict = checked(make_recipe, tmp_path, "torch", "torch plan.tensor=2", "fp64", FULL, family="glm")
    first = verdict.comparison.first_divergence
    assert first is not None
    assert (first.location.phase, first.location.tensor) == ("activation", "layers.0.product")


@pytest.mark.full
def test_a_gradient_of_own_heads_only_is_seen(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Control: without the sum over peers the first to differ is a norm of the last layer's heads."""
    plant(NOT_SUMMED, tmp_path, monkeypatch)
    verdict = checked(make_recipe, tmp_path, "torch", "torch plan.tensor=2", "fp64", FULL)
    first = verdict.comparison.first_divergence
    assert first is not None
    assert (first.location.phase, first.location.tensor) == (
        "gradient",
        "model.layers.1.self_attn.k_norm.weight",
    )
