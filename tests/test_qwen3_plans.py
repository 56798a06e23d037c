"""Qwen3 on several devices: the norms of heads are whole on every tensor peer, and each peer sees only its own heads."""

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
PLANS: list[tuple[str, str, Policy]] = [
    ("jax plan.tensor=2", "torch plan.tensor=2", "fp64"),
    ("jax plan.data=2", "torch plan.data=2", "fp64"),
    ("jax plan.fsdp=2 plan.shards=params", "torch", "fp64"),
    ("jax plan.pipe=2 plan.microbatches=2", "torch", "fp64"),
    ("jax plan.pipe=2 plan.microbatches=2", "torch plan.pipe=2 plan.microbatches=2", "fp32"),
    ("jax plan.tensor=2 plan.fsdp=2 plan.shards=params", "torch plan.tensor=2 plan.fsdp=2 plan.shards=params", "fp32"),
]  # fmt: skip
# On torch, a tensor peer that keeps the gradient of its own heads.
NOT_SUMMED = """
import torchtrain.tensor_parallel
from torch.func import functional_call
torchtrain.tensor_parallel.HeadNorm.forward = lambda self, x: functional_call(self._norm[0], {"weight": self.weight}, (x,))
"""


def checked(make: Make, home: Path, left: str, right: str, precision: Policy, method: dict) -> Verdict:
    recipe = make("qwen3", method=method, optimizer={"lr": 1e-3, "clip_norm": 0.5, "weight_decay": 0.1})
    (home / "recipe.yaml").write_text(recipe.to_yaml())
    return check(
        home / "recipe.yaml", left=parse_side(left), right=parse_side(right), precision=precision, steps=2,
        overrides=(), out=home / "check",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("left", "right", "precision"), [pytest.param(*p, marks=pytest.mark.full if i else ()) for i, p in enumerate(PLANS)]
)  # fmt: skip
def test_a_plan_changes_nothing(make_recipe: Make, tmp_path: Path, left: str, right: str, precision: Policy):
    verdict = checked(make_recipe, tmp_path, left, right, precision, FULL)
    assert verdict.holds, verdict.lines(colour=False)
    assert verdict.comparison.notes == ()  # both traces say their causal order


@pytest.mark.full
def test_low_rank_pairs_of_queries(make_recipe: Make, tmp_path: Path):
    verdict = checked(make_recipe, tmp_path, "jax plan.tensor=2", "torch plan.tensor=2", "fp64", LORA)
    assert verdict.holds, verdict.lines(colour=False)


@pytest.mark.full
def test_a_gradient_of_own_heads_only_is_seen(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Control: without the sum over peers the first to differ is a norm of the last layer's heads."""
    (tmp_path / "sitecustomize.py").write_text(NOT_SUMMED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    verdict = checked(make_recipe, tmp_path, "torch", "torch plan.tensor=2", "fp64", FULL)
    first = verdict.comparison.first_divergence
    assert first is not None
    assert (first.location.phase, first.location.tensor) == (
        "gradient",
        "model.layers.1.self_attn.k_norm.weight",
    )
