"""Greedy generation beside transformers' own `generate`, with an adapter beside PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small import QA
from transformers import AutoModelForCausalLM

from torchtrain.cli import main
from trainspec.recipe import Recipe

# Families that transformers reads from their directories.
OTHERS = ("tied", "qwen3", "qwen2", "mistral", "smollm3", "glm", "yarn-rope")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": "all-linear"},
    "dora": {"kind": "dora", "rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]},
    "prefix": {"kind": "prefix", "virtual_tokens": 5},
    "prefix-projection": {"kind": "prefix", "virtual_tokens": 5, "projection": True, "hidden": 16},
    "prompt": {"kind": "prompt", "virtual_tokens": 5},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 5, "hidden": 16},
}


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[int], Path]:
    """A file of the first records."""

    def write(count: int) -> Path:
        file = tmp_path / f"prompts-{count}.jsonl"
        file.write_text(
            "\n".join(QA.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8"
        )
        return file

    return write


def generated(
    recipe: Recipe, prompts: Path, out: Path, *, tokens: int, batch: int = 8, more: Sequence[str] = ()
) -> list[dict]:
    out.mkdir(exist_ok=True)
    file = out / "r.yaml"
    file.write_text(recipe.to_yaml())
    words = ["--out", str(out), "--file", str(prompts), "--max-tokens", str(tokens), "--batch", str(batch)]
    start = [] if (out / "checkpoints").exists() else ["--untrained"]
    assert main(["generate", str(file), *words, "--scores", *start, *more]) == 0
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def theirs(model: Any, prompt_ids: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return made[0, ids.shape[1] :].tolist()


def check_same(found: Sequence[dict], wanted: Sequence[list[int]]) -> None:
    """Every token is the same; where not, how near the two were is said."""
    for number, (generation, ids) in enumerate(zip(found, wanted, strict=True)):
        pairs = zip(generation["ids"], ids, generation["scores"], strict=False)
        parted = next(((i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
        assert parted is None, f"prompt {number}: token, ours, theirs, score: {parted}"
        assert len(generation["ids"]) == len(ids), f"prompt {number}"


@pytest.mark.parametrize("variant", ["plain", *(pytest.param(v, marks=pytest.mark.full) for v in OTHERS)])
def test_greedy_tokens_are_those_of_transformers(
    make_recipe, model_dirs, tmp_path: Path, prompts: Callable[[int], Path], variant: str
):
    recipe = make_recipe(variant, data={"sequence_tokens": 64})
    found = generated(recipe, prompts(4), tmp_path / "run", tokens=24)
    model = AutoModelForCausalLM.from_pretrained(model_dirs[variant], dtype=torch.float32).eval()
    check_same(found, [theirs(model, g["prompt_ids"], 24) for g in found])
    assert len({tuple(g["ids"]) for g in found}) > 1


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("variant", ["plain", *OTHERS])
def test_greedy_tokens_of_many_prompts_are_those_of_transformers(
    make_recipe, model_dirs, tmp_path: Path, prompts: Callable[[int], Path], variant: str, precision: str
):
    """100 prompts in padded batches, some of them by themselves, and with whole rows in place of a cache."""
    recipe = make_recipe(variant, precision={"policy": precision, "reduce": precision})
    found = generated(recipe, prompts(100), tmp_path / "run", tokens=64)
    model = AutoModelForCausalLM.from_pretrained(model_dirs[variant], dtype=DTYPES[precision]).eval()
    wanted = [theirs(model, g["prompt_ids"], 64) for g in found]
    check_same(found, wanted)
    check_same(generated(recipe, prompts(20), tmp_path / "alone", tokens=64, batch=1), wanted[:20])
    check_same(generated(recipe, prompts(20), tmp_path / "rows", tokens=64, more=["--no-cache"]), wanted[:20])
    assert len({tuple(ids) for ids in wanted}) > 50


@pytest.mark.parametrize(
    ("kind", "count", "tokens"),
    [
        ("lora", 4, 24),
        *(pytest.param(kind, 100, 64, marks=pytest.mark.full(minutes=3)) for kind in METHODS),
    ],
)
def test_a_trained_adapter_is_applied_as_peft_applies_it(
    make_recipe,
    model_dirs,
    tmp_path: Path,
    prompts: Callable[[int], Path],
    kind: str,
    count: int,
    tokens: int,
):
    recipe, out = make_recipe(method=METHODS[kind], optimizer={"lr": 0.05}), tmp_path / "run"
    base = generated(recipe, prompts(count), tmp_path / "base", tokens=tokens)
    assert main(["train", str(tmp_path / "base/r.yaml"), "--out", str(out)]) == 0
    found = generated(recipe, prompts(count), out, tokens=tokens)
    alone = generated(recipe, prompts(min(count, 20)), out, tokens=tokens, batch=1)
    assert main(["export", str(out / "r.yaml"), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(model_dirs["plain"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    wanted = [theirs(model, g["prompt_ids"], tokens) for g in found]
    check_same(found, wanted)
    check_same(alone, wanted[: len(alone)])
    assert [g["ids"] for g in found] != [
        g["ids"] for g in base
    ]  # control: it was trained away from its start
