"""Families on several devices.

Qwen3's norms of heads are whole on every tensor peer, and each peer sees only its own heads; GLM's matrix of gate and up is
split in both of its halves; a stage of a pipeline knows which of its layers rotate; a window is the same wherever rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parity.check import check
from parity.report.verdict import Verdict
from parity.runs.sides import parse_side
from trainspec.plans.plan import Policy
from trainspec.recipe import Recipe

Make = Callable[..., Recipe]
FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["q_proj"]}
PIPE = "plan.pipe=2 plan.microbatches=2"
# Every family under every kind of plan is in `parity matrix`; here are norms of heads, and plans that it has no families on.
PLANS: list[tuple[str, str, str, Policy]] = [
    ("qwen3", "jax plan.tensor=2", "torch plan.tensor=2", "fp64"),
    ("qwen3", "jax plan.tensor=2 plan.fsdp=2 plan.shards=params", "torch plan.tensor=2 plan.fsdp=2 plan.shards=params", "fp32"),
    ("smollm3", f"jax {PIPE}", f"torch {PIPE}", "fp32"),
    ("mistral", "jax plan.data=2", "torch plan.data=2", "fp64"),
]  # fmt: skip
# P-Tuning v2 as published with ChatGLM2. A peer draws the masks of its own heads, a stage those of its own layers.
PUBLISHED = {
    "kind": "prefix", "virtual_tokens": 3, "positions": "from_zero", "dropout": 0.2, "projection": True, "projected": "all_layers",
}  # fmt: skip
# Beside the matrix's plans of it: under recomputation, and split in two ways at once.
PREFIX_PLANS: list[tuple[str, str, Policy]] = [
    (f"jax {PIPE} plan.remat=full", "torch plan.data=2", "fp64"),
    ("jax plan.data=2 plan.tensor=2", "torch plan.fsdp=2 plan.shards=params plan.tensor=2", "bf16"),
]
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


def checked(
    make: Make, home: Path, left: str, right: str, precision: Policy, method: dict, *, family: str = "qwen3"
) -> Verdict:
    recipe = make(family, method=method, optimizer={"lr": 1e-3, "clip_norm": 0.5, "weight_decay": 0.1})
    (home / "recipe.yaml").write_text(recipe.to_yaml())
    return check(
        home / "recipe.yaml", left=parse_side(left), right=parse_side(right), precision=precision, steps=2,
        overrides=(), out=home / "check",
    )  # fmt: skip


# Of the fast tests: norms of heads on two tensor peers, in tests/torchtrain/test_sharded.py.
@pytest.mark.full
@pytest.mark.parametrize(("family", "left", "right", "precision"), PLANS)
def test_a_plan_changes_nothing(
    make_recipe: Make, tmp_path: Path, family: str, left: str, right: str, precision: Policy
):
    verdict = checked(make_recipe, tmp_path, left, right, precision, FULL, family=family)
    assert verdict.holds, verdict.lines(colour=False)
    assert verdict.comparison.notes == ()  # both traces say their causal order


@pytest.mark.full
@pytest.mark.parametrize(("left", "right", "precision"), PREFIX_PLANS)
def test_a_published_prefix(make_recipe: Make, tmp_path: Path, left: str, right: str, precision: Policy):
    verdict = checked(make_recipe, tmp_path, left, right, precision, PUBLISHED, family="chatglm2")
    assert verdict.holds, verdict.lines(colour=False)


# One A of queries, keys and values, which peers and stages hold once.
TIED = LORA | {"targets": ["query_key_value", "dense_4h_to_h"], "dropout": 0.1}
TIED_PLANS: list[tuple[str, str, Policy]] = [
    ("jax plan.tensor=2", "torch plan.tensor=2", "fp64"),
    (f"jax {PIPE} plan.remat=full", "torch plan.data=2", "fp64"),
    (f"jax {PIPE}", f"torch {PIPE}", "fp32"),
    ("jax plan.fsdp=2 plan.shards=params", "torch plan.fsdp=2 plan.shards=params plan.tensor=2", "bf16"),
]


@pytest.mark.full
@pytest.mark.parametrize(("left", "right", "precision"), TIED_PLANS)
def test_one_a_of_a_fused_matrix(make_recipe: Make, tmp_path: Path, left: str, right: str, precision: Policy):
    verdict = checked(make_recipe, tmp_path, left, right, precision, TIED, family="chatglm2")
    assert verdict.holds, verdict.lines(colour=False)


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
def test_low_rank_pairs_of_queries(make_recipe: Make, tmp_path: Path):
    verdict = checked(make_recipe, tmp_path, "jax plan.tensor=2", "torch plan.tensor=2", "fp64", LORA)
    assert verdict.holds, verdict.lines(colour=False)


@pytest.mark.full
def test_low_rank_pairs_of_gate_and_up(make_recipe: Make, tmp_path: Path):
    method = LORA | {"targets": ["gate_up_proj", "down_proj"]}
    verdict = checked(
        make_recipe, tmp_path, "jax plan.tensor=2", "torch plan.tensor=2", "fp64", method, family="glm"
    )
    assert verdict.holds, verdict.lines(colour=False)


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
