"""The field's mistakes about families show in a recipe's small twin, at the place where the large model would have them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from small import QA

from parity.comparison.compare import Finding
from parity.diff import diff
from parity.faults import FAULTS
from parity.runs.launch_many import Case, run_cases, training
from trainspec.backends import BACKENDS
from trainspec.families import PRESETS
from trainspec.files.model_config import config_of
from trainspec.model import ModelSpec
from trainspec.plans.plan import Backend
from trainspec.small import RECIPE_FILE, write_small_twin

BY_NAME = {fault.name: fault for fault in FAULTS}
MISTRAL_V01 = replace(PRESETS["mistral-7b-v0.3"], window=4096)
MODELS: dict[str, ModelSpec] = {
    "glm": PRESETS["glm-4-9b"],
    "mistral": MISTRAL_V01,
    "smollm3": PRESETS["smollm3-3b"],
    "qwen2": PRESETS["qwen2.5-7b"],
    "qwen3": PRESETS["qwen3-8b"],
    "chatglm2": PRESETS["chatglm2-6b"],
}


@dataclass(frozen=True)
class Planted:
    """A mistake in a model, the plan of its recipe, and the layer at which it shows first where that is not the registry's."""

    model: str
    tensor: int = 1
    layer: tuple[str, str] | None = None


MISTAKES = {
    "norm-epsilon-of-another-family": Planted("glm"),
    "gate-and-up-swapped": Planted("glm", tensor=8),
    "head-norm-behind-the-rotation": Planted("qwen3"),
    "head-norm-gradient-not-reduced": Planted("qwen3", tensor=8),
    "window-off-by-one": Planted("mistral"),
    # Every fourth layer does not rotate; the registry's model has two, and it is the second.
    "rotated-where-it-should-not-be": Planted("smollm3", layer=("layers.1.", "layers.3.")),
    "bias-on-the-output": Planted("qwen2"),
    "rotary-table-in-half-precision": Planted("chatglm2"),
}
CASES = [(name, backend) for name in MISTAKES for backend in BACKENDS if backend in BY_NAME[name].edits]
SETUPS = sorted({(planted.model, planted.tensor) for planted in MISTAKES.values()})


def home_of(home: Path, what: str, backend: str) -> Path:
    return home / what / backend


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> Path:
    """Traces of the small twin of every set-up, clean and with every mistake, on both backends: few launches."""
    home, recipes = tmp_path_factory.mktemp("small-faults"), {}
    for model, tensor in SETUPS:
        directory = home / f"{model}-{tensor}"
        (directory / "large").mkdir(parents=True)
        # The vocabulary stays as large as it is: a small one has few logits to store.
        config = config_of(replace(MODELS[model], vocab=320))
        (directory / "large/config.json").write_text(json.dumps(config))
        sections = {
            "model": {"from": str(directory / "large"), "weights": "random"},
            "method": {"kind": "full"},
            "data": {"train": str(QA), "tokenizer": str(model_dirs["plain"]), "sequence_tokens": 2048},
            "batch": {"global_examples": 64, "accumulation": 4},
            "plan": {"tensor": tensor},
            "precision": {"policy": "fp64", "reduce": "fp64"},
            "optimizer": {"lr": 1e-3},
            "run": {"steps": 1000, "stop_after_steps": 1},
        }
        (directory / "large.yaml").write_text(yaml.safe_dump(sections))
        twin = write_small_twin(directory / "large.yaml", [], directory / "small")
        assert twin.recipe.plan.devices == min(tensor, 2)
        recipes[model, tensor] = directory / "small" / RECIPE_FILE
    for backend in BACKENDS:
        cases: list[Case] = []
        for (model, tensor), recipe in recipes.items():
            where = home_of(home, f"{model}-{tensor}-clean", backend)
            cases.append(training(recipe, where, devices=min(tensor, 2), activations=True))
        for name, planted_in in CASES:
            if planted_in == backend:
                mistake = MISTAKES[name]
                case = training(
                    recipes[mistake.model, mistake.tensor],
                    home_of(home, name, backend),
                    devices=min(mistake.tensor, 2),
                    edits=BY_NAME[name].edits[backend],
                    activations=True,
                )
                cases.append(case)
        for case, ended in zip(cases, run_cases(backend, cases, home=home / "launches"), strict=True):
            assert ended.wrong is None, f"{case.argv}: {ended.wrong}"
    return home


def first_divergence(home: Path, jax: str, torch: str) -> Finding | None:
    traces = home_of(home, jax, "jax") / "trace", home_of(home, torch, "torch") / "trace"
    return diff(*traces, precision="fp64", out=None).comparison.first_divergence


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize(("model", "tensor"), SETUPS)
def test_clean_twins_agree(trained: Path, model: str, tensor: int):
    clean = f"{model}-{tensor}-clean"
    assert first_divergence(trained, clean, clean) is None


@pytest.mark.full
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_mistake_shows_at_its_place(trained: Path, name: str, backend: Backend):
    mistake, fault = MISTAKES[name], BY_NAME[name]
    clean = f"{mistake.model}-{mistake.tensor}-clean"
    found = first_divergence(trained, *(name if side == backend else clean for side in ("jax", "torch")))
    assert found is not None
    assert fault.where is not None
    where = fault.where
    if mistake.layer:
        registry, here = mistake.layer
        where = replace(
            where, tensor=where.tensor.replace(registry.replace(".", r"\."), here.replace(".", r"\."))
        )
    assert where.matches(found.location), found.location
