"""`parity check --small`: recipes of large models are proven by their small twins, and a difference is found in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import RECIPES, name_of, offline
from small import QA, ROOT

from parity.cli import main
from parity.judging.many import CheckRequest, RunPair, make_runs
from parity.runs.sides import Side
from trainspec.recipe import load_recipe
from trainspec.small import RECIPE_FILE, write_small_twin

LARGE = """
model: {{from: "preset:{preset}", weights: random}}
method: {{kind: lora, rank: 16, targets: all-linear}}
data: {{train: {train}, tokenizer: {tokenizer}, sequence_tokens: 2048, packing: true}}
batch: {{global_examples: 64, accumulation: {accumulation}}}
plan: {{{plan}}}
schedule: {{kind: cosine, warmup_steps: 100}}
run: {{steps: 1000}}
"""


def recipe(home: Path, tokenizer: Path, preset: str, plan: str, *, accumulation: int = 1) -> str:
    file = home / f"{preset}.yaml"
    words = {"preset": preset, "plan": plan, "accumulation": accumulation}
    file.write_text(LARGE.format(**words, train=QA, tokenizer=tokenizer))
    return str(file)


# Of families that no shipped recipe has.
@pytest.mark.full
@pytest.mark.parametrize(
    ("preset", "plan", "accumulation"),
    [("smollm3-3b", "fsdp: 8, shards: params", 1), ("glm-4-9b", "tensor: 2", 2)],
)
def test_a_large_recipe_is_proven_by_its_small_twin(tmp_path, model_dirs, capsys, preset, plan, accumulation):
    file = recipe(tmp_path, model_dirs["plain"], preset, plan, accumulation=accumulation)
    assert main(["check", file, "--small", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"small twin of {file}" in said
    assert ("torch on one device" in said) == ("pipe" in plan or "params" in plan)


ON_ONE_DEVICE = [path for path in RECIPES if load_recipe(path).plan.devices == 1]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory) -> dict[Path, RunPair]:
    """What `parity check --small` trains of each of `ON_ONE_DEVICE`, in one process of each backend."""
    home, groups = tmp_path_factory.mktemp("small"), []
    for path in ON_ONE_DEVICE:
        directory = home / name_of(path)
        write_small_twin(path, offline(path), directory / "small")
        groups.append([CheckRequest(directory / "small" / RECIPE_FILE, (), directory)])
    sides = Side("jax"), Side("torch")
    runs = make_runs(groups, sides=sides, precision="fp64", steps=2, home=home / "launches")
    return dict(zip(ON_ONE_DEVICE, runs, strict=True))


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("path", ON_ONE_DEVICE, ids=name_of)
def test_every_shipped_recipe_of_one_device_is_proven_by_its_small_twin(on_one_device, path):
    """In fp64, the models' sizes from their presets, as nothing is fetched."""
    comparison = on_one_device[path].judged()
    assert comparison.steps == 2
    assert comparison.holds, comparison.first_divergence


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("path", [path for path in RECIPES if path not in ON_ONE_DEVICE], ids=name_of)
def test_every_shipped_recipe_of_several_devices_is_proven_by_its_small_twin(tmp_path, capsys, path):
    settings = [word for setting in offline(path) for word in ("--set", setting)]
    assert (
        main(["check", str(path), "--small", "--steps", "2", "--out", str(tmp_path / "out"), *settings]) == 0
    )
    assert "PASS" in capsys.readouterr().out


def test_a_plan_that_the_model_itself_cannot_have_is_refused(tmp_path, model_dirs, capsys):
    """Its twin could: two key/value heads are split over two devices, and not over four."""
    file = recipe(tmp_path, model_dirs["plain"], "tiny", "tensor: 4")
    arguments = [
        "check",
        file,
        "--small",
        "--out",
        str(tmp_path / "out"),
        "--set",
        f"model.from={model_dirs['plain']}",
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("parity: plan.tensor=4 cannot split kv_heads=2 of ")
    assert not list((tmp_path / "out").glob("*/run"))


@pytest.mark.full
def test_a_difference_is_found_in_a_small_twin(tmp_path, capsys):
    arguments = [
        "--small",
        "--steps",
        "2",
        "--right",
        "torch optimizer.eps=1e-6",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["check", str(ROOT / "configs/full.yaml"), *arguments]) == 1
    assert "update" in capsys.readouterr().out
