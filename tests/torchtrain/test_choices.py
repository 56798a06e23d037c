"""The accuracy of multiple choice beside a plain computation: transformers' model and tokenizer, and nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import QA
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtrain.cli import main

COUNT, OFFERED = 12, 4


def records() -> list[dict]:
    """Questions, each with its answer and those of the next ones."""
    read = [json.loads(line) for line in QA.read_text(encoding="utf-8").splitlines()[: COUNT + OFFERED]]
    made = []
    for number in range(COUNT):
        choices = [record["output"] for record in read[number : number + OFFERED]]
        turned = choices[number % OFFERED :] + choices[: number % OFFERED]
        made.append({"instruction": read[number]["instruction"], "output": choices[0], "choices": turned})
    return made


def theirs(directory: Path, record: dict) -> list[float]:
    """The log-likelihood of every choice after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    prompt = f"Question: {record['instruction']}\nAnswer:\n"
    start, found = len(tokenizer(prompt).input_ids), []
    for choice in record["choices"]:
        ids = torch.tensor(tokenizer(prompt + choice).input_ids)
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(log_probs.gather(-1, ids[1:, None])[start - 1 :].sum().item())
    return found


def test_accuracy_is_that_of_transformers_alone(make_recipe, model_dirs, tmp_path: Path):
    asked, out = records(), tmp_path / "run"
    heldout, file = tmp_path / "heldout.jsonl", tmp_path / "r.yaml"
    heldout.write_text("".join(json.dumps(record) + "\n" for record in asked), encoding="utf-8")
    recipe = make_recipe(data={"heldout": str(heldout), "sequence_tokens": 400}, precision={"policy": "fp64"})
    file.write_text(recipe.to_yaml())
    assert main(["eval", str(file), "--out", str(out), "--untrained", "--max-tokens", "1"]) == 0
    figures = json.loads((out / "eval.json").read_text())["untrained"]
    lines = [
        json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    right, right_normalised = [], []
    for record, line in zip(asked, lines, strict=True):
        wanted = theirs(model_dirs["plain"], record)
        assert [choice["text"] for choice in line["choices"]] == record["choices"]
        mine = [choice["log_likelihood"] for choice in line["choices"]]
        assert mine == pytest.approx(wanted, abs=1e-4)  # transformers' rotary tables are float32
        lengths = [len(choice) for choice in record["choices"]]
        picked = [int(np.argmax(wanted)), int(np.argmax(np.array(wanted) / lengths))]
        for hits, index in zip((right, right_normalised), picked, strict=True):
            hits.append(record["choices"][index] == record["output"])
    assert figures["accuracy"] == pytest.approx(100 * np.mean(right))
    assert figures["accuracy_normalised"] == pytest.approx(100 * np.mean(right_normalised))
    assert right != right_normalised  # control: the two figures can be told apart
