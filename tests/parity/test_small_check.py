"""`parity check --small`: recipes of large models are proven by their small twins, and a difference is found in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import RECIPES, name_of, offline
from small import QA, ROOT

from parity.cli import main

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


@pytest.mark.full
@pytest.mark.parametrize(
    ("preset", "plan", "accumulation"),
    [
        ("llama3.1-70b", "pipe: 4, tensor: 8, fsdp: 2, shards: optimizer, microbatches: 4, remat: full", 2),
        ("qwen2.5-0.5b", "", 2),
        ("smollm3-3b", "fsdp: 8, shards: params", 1),
        ("glm-4-9b", "tensor: 2", 1),
    ],
)
def test_a_large_recipe_is_proven_by_its_small_twin(tmp_path, model_dirs, capsys, preset, plan, accumulation):
    file = recipe(tmp_path, model_dirs["plain"], preset, plan, accumulation=accumulation)
    assert main(["check", file, "--small", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"small twin of {file}" in said
    assert ("torch on one device" in said) == ("pipe" in plan or "params" in plan)


@pytest.mark.full
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_shipped_recipe_is_proven_by_its_small_twin(tmp_path, capsys, path):
    """In fp64, the models' sizes from their presets, as nothing is fetched."""
    settings = [word for setting in offline(path) for word in ("--set", setting)]
    assert (
        main(["check", str(path), "--small", "--steps", "2", "--out", str(tmp_path / "out"), *settings]) == 0
    )
    assert "PASS" in capsys.readouterr().out


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
