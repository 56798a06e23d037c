"""The claim itself: the same recipe is the same training on both backends, and a real difference is caught.

Each backend trains every case in one process; `parity diff`'s comparison judges the traces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from asked import asked_for
from many import run_many
from small import recipe_maker

from parity.diff import diff
from parity.runs.fixture import METHODS
from parity.runs.launch_many import run_cases, training
from trainspec.plans.plan import Backend, Plan
from trainspec.recipe import Recipe
from trainspec.trace import Trace

Make = Callable[..., Recipe]
FP64 = {"policy": "fp64", "reduce": "fp64"}
STEPS = 10


@dataclass(frozen=True)
class Case:
    method: str
    accumulation: int
    packing: bool
    variant: str = "plain"
    padding_side: str = "right"
    remat: str = "none"
    targets: str | tuple[str, ...] = ("q_proj", "v_proj", "down_proj")

    def __str__(self) -> str:
        rows = "packed" if self.packing else f"padded-{self.padding_side}"
        some = "" if self.targets == Case.targets else "-head" if "lm_head" in self.targets else "-layer1"
        return f"{self.method}{some}-{self.variant}-accumulation{self.accumulation}-{rows}-remat-{self.remat}"


# Of the fast tests: a family, and a method whose weights are in the layers.
FAST = [Case("full", 2, True, "qwen3", remat="full"), Case("lora", 4, False)]
CASES = [
    *FAST,
    Case("full", 2, True, "tied"),
    Case("lora", 2, True, "bias", remat="full"),
    Case("adapter", 2, True, "bias", remat="full"),
    Case("dora", 2, True, "bias", remat="full"),
    # `parity matrix` has every method, every family and every accumulation of both methods.
    Case("full", 4, False),
    Case("lora", 1, True),
    Case("full", 2, False, "bias", padding_side="left"),
    Case("lora", 2, True, "llama3-rope"),
    Case("lora", 2, False, "qwen3", targets=("q_proj",)),
    Case("lora", 2, True, targets=("lm_head", "o_proj")),
    Case("lora", 2, True, targets=r"model\.layers\.1\..*(q|up)_proj"),
    Case("dora", 2, True, targets=r"model\.layers\.1\..*(q|up)_proj"),
    Case("prompt", 2, False, "tied", padding_side="left"),
    Case("ptuning-mlp", 2, True),
    Case("ptuning-lstm", 2, True, remat="full"),
    Case("prefix", 2, False, padding_side="left", remat="full"),
    Case("prefix-projection", 4, True),
    Case("full", 1, False, "mistral", padding_side="left"),
    Case("full", 2, True, "smollm3", remat="full"),
    Case("full", 1, True, "chatglm2"),
    Case("lora", 2, True, "glm", targets=("q_proj", "gate_up_proj", "down_proj")),
    Case("dora", 2, False, "glm", targets=("v_proj", "gate_up_proj")),
    Case("prefix", 2, False, "mistral", padding_side="left"),
    Case("prompt", 2, True, "mistral"),
    Case("prefix-projection", 2, True, "glm"),
]
FP32_CASES = [Case("lora", 2, True), Case("full", 2, True, "tied", remat="full")]


def recipe_of(make: Make, case: Case, **precision) -> Recipe:
    method = METHODS[case.method].model_dump()
    if "targets" in method:
        method |= {"targets": case.targets}
    return make(
        case.variant,
        method=method,
        # 320 tokens hold two or three records, so a packed row is one.
        data={
            "packing": case.packing,
            "padding_side": case.padding_side,
            "sequence_tokens": 320 if case.packing else 160,
        },
        batch={"global_examples": 4, "accumulation": case.accumulation},
        optimizer={"lr": 3e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        schedule={"kind": "cosine", "warmup_steps": 3},
        plan={"remat": case.remat},
        run={"steps": STEPS},
        precision=precision or FP64,
    )


def train_all(program: str, recipes: dict[str, tuple[Recipe, list[str]]], root: Path) -> None:
    """Leaves a trace under root/program/NAME for every recipe and what is changed in it on the command line."""
    cases = []
    for name, (recipe, changes) in recipes.items():
        file = root / f"{name}.yaml"
        file.write_text(recipe.to_yaml())
        home = root / program / name
        cases.append(
            ["train", str(file), *changes, "--out", str(home / "run"), "--trace", str(home / "trace")]
        )
    for name, result in zip(recipes, run_many(program, cases, root / program / "many"), strict=True):
        assert result["code"] == 0, f"{program} {name}: {result['err'][-2000:]}"


@pytest.fixture(scope="module")
def module_recipes(model_dirs, tmp_path_factory) -> Make:
    """`make_recipe` for fixtures that live as long as the module."""
    return recipe_maker(model_dirs)


# What a float32 check must still see, planted in the torch side, and where it must show first.
PLANTED = {
    "method.alpha=8.1": "gradient",
    "optimizer.betas=[0.9,0.99]": "moment2",
    "optimizer.weight_decay=0.2": "update",
}


def in_fp32(case: Case) -> str:
    """The name of its run in float32."""
    return f"fp32-{case}"


@pytest.fixture(scope="module")
def runs(
    module_recipes: Make, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """What the tests ask for, all in one process of each program; the controls plant their mistakes in the first float32 case."""
    root = tmp_path_factory.mktemp("runs")
    recipes = {str(case): (recipe_of(module_recipes, case), []) for case in asked_for(request, "case")}
    for case in dict.fromkeys((FP32_CASES[0], *asked_for(request, "fp32_case"))):
        recipes[in_fp32(case)] = recipe_of(module_recipes, case, policy="fp32", reduce="fp32"), []
    first, _ = recipes[in_fp32(FP32_CASES[0])]
    planted = {setting: (first, ["--set", setting]) for setting in asked_for(request, "setting")}
    train_all("jaxtrain", recipes, root)
    train_all("torchtrain", recipes | planted, root)
    return root


def traces(root: Path, name: str) -> tuple[Path, Path]:
    return root / "jaxtrain" / name / "trace", root / "torchtrain" / name / "trace"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(c), marks=() if c in FAST else pytest.mark.full(minutes=3))
        for c in dict.fromkeys(CASES)
    ],
)
def test_fp64_proof(runs: Path, case: Case, tmp_path: Path, record_property):
    left, right = traces(runs, str(case))
    verdict = diff(left, right, precision="fp64", out=tmp_path)
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict.holds, found["first_divergence"]
    assert found["steps"] == STEPS
    for trace in (left, right):  # a run that is finite leaves no stopped step
        assert not (trace / "stopped.safetensors").exists()
        assert Trace(trace).stopped is None
    for phase in ("gradient", "update", "moment1", "moment2"):
        record_property(phase, found["worst"][phase]["error"])
        assert found["worst"][phase]["error"] <= 1e-9


@pytest.mark.parametrize(
    "fp32_case", [FP32_CASES[0], pytest.param(FP32_CASES[1], marks=pytest.mark.full(minutes=3))], ids=str
)
def test_fp32_under_deepspeed_is_within_its_bound(runs: Path, fp32_case: Case, tmp_path: Path):
    left, right = traces(runs, in_fp32(fp32_case))
    verdict = diff(left, right, precision="fp32", out=tmp_path)
    assert verdict.holds, (tmp_path / "verdict.json").read_text()


# Split over devices: torch takes both in one launch of two processes, under DeepSpeed.
PLANNED = {
    "lora-tensor-2": (Case("lora", 2, True, "bias"), {"tensor": 2}),
    "full-zero3-2": (Case("full", 2, True, "tied"), {"fsdp": 2, "shards": "params"}),
}


@pytest.fixture(scope="module")
def planned_runs(module_recipes: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    for backend in get_args(Backend):
        cases = []
        for name, (case, plan) in PLANNED.items():
            recipe = recipe_of(module_recipes, case, policy="fp32", reduce="fp32")
            recipe = recipe.model_copy(update={"plan": Plan(**plan)})
            (root / f"{name}.yaml").write_text(recipe.to_yaml())
            home = root / f"{backend}train" / name
            cases.append(training(root / f"{name}.yaml", home, devices=recipe.plan.devices))
        for name, ended in zip(PLANNED, run_cases(backend, cases, home=root / "launches"), strict=True):
            assert ended.wrong is None, f"{backend} {name}: {ended.wrong}"
    return root


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("name", PLANNED)
def test_split_over_devices_is_within_the_fp32_bound(planned_runs: Path, name: str, tmp_path: Path):
    verdict = diff(*traces(planned_runs, name), precision="fp32", out=tmp_path)
    assert verdict.holds, (tmp_path / "verdict.json").read_text()


@pytest.mark.parametrize("setting", PLANTED)
def test_the_fp32_bound_catches_a_small_difference(runs: Path, setting: str, tmp_path: Path):
    """Negative control: the bound that equal recipes keep is broken by a setting that differs a little."""
    left, _ = traces(runs, in_fp32(FP32_CASES[0]))
    right = traces(runs, setting)[1]
    assert not diff(left, right, precision="fp32", out=tmp_path).holds
    first = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert first["error"] > first["bound"] > 0
    assert first["phase"] == PLANTED[setting]
