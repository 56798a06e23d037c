"""Greedy generation beside transformers' own `generate`, with an adapter beside PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small import QA
from transformers import AutoModelForCausalLM

from torchtrain.cli import main

TOKENS = 24
PROMPTS = 4
# Families that transformers reads from their directories.
OTHERS = ("tied", "qwen3", "qwen2", "mistral", "smollm3", "glm", "yarn-rope")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(QA.read_text(encoding="utf-8").splitlines()[:PROMPTS]) + "\n", encoding="utf-8")
    return file


def generated(recipe, prompts: Path, out: Path) -> list[dict]:
    out.mkdir(exist_ok=True)
    file = out / "r.yaml"
    file.write_text(recipe.to_yaml())
    words = ["--out", str(out), "--file", str(prompts), "--max-tokens", str(TOKENS)]
    assert main(["generate", str(file), *words]) == 0
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def theirs(model, prompt_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ].tolist()


@pytest.mark.parametrize("variant", ["plain", *(pytest.param(v, marks=pytest.mark.full) for v in OTHERS)])
def test_greedy_tokens_are_those_of_transformers(
    make_recipe, model_dirs, tmp_path: Path, prompts: Path, variant: str
):
    found = generated(make_recipe(variant, data={"sequence_tokens": 64}), prompts, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(model_dirs[variant], dtype=torch.float32).eval()
    for generation in found:
        assert generation["ids"] == theirs(model, generation["prompt_ids"])
    assert len({tuple(g["ids"]) for g in found}) > 1


def test_a_trained_adapter_is_applied_as_peft_applies_it(
    make_recipe, model_dirs, tmp_path: Path, prompts: Path
):
    recipe, out = make_recipe(optimizer={"lr": 0.05}), tmp_path / "run"
    base = generated(recipe, prompts, tmp_path / "base")
    assert main(["train", str(tmp_path / "base/r.yaml"), "--out", str(out)]) == 0
    found = generated(recipe, prompts, out)
    assert main(["export", str(out / "r.yaml"), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(model_dirs["plain"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    for generation in found:
        assert generation["ids"] == theirs(model, generation["prompt_ids"])
    assert [g["ids"] for g in found] != [
        g["ids"] for g in base
    ]  # control: it was trained away from its start
