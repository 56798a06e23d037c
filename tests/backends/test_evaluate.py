"""Evaluation on a backend: its answers are those of `generate`, its choices have the probabilities of the logits, and a run
that is stopped and resumed has the answers of one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from backend import BACKEND, PROGRAM, logits, main, start_state, train
from test_model import FP64, FULL, LORA

from trainspec.evaluation.choices import log_likelihood
from trainspec.evaluation.heldout import Choice
from trainspec.generation.rows import batch_of
from trainspec.runs.run import resolve

RECORDS = [
    {"instruction": "What is a list?", "output": "Items.", "choices": ["A number.", "Items."]},
    {"instruction": "Why?", "output": "So.", "references": ["So."]},
]
PROMPT = {"kind": "prompt", "virtual_tokens": 3}


@pytest.fixture
def heldout(tmp_path: Path) -> str:
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return str(file)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_both_models_answer_as_generate_does(make_recipe, heldout: str, tmp_path: Path, capsys):
    recipe = make_recipe(method=FULL, precision=FP64, data={"heldout": heldout}, optimizer={"lr": 0.05})
    file, out = tmp_path / "r.yaml", tmp_path / "run"
    file.write_text(recipe.to_yaml())
    words = [str(file), "--out", str(out), "--max-tokens", "5"]

    def generated(*more: str) -> list[list[int]]:
        assert main(["generate", *words, *more, "--file", heldout]) == 0
        return [line["ids"] for line in lines_of(out / "generations.jsonl")]

    before = generated("--untrained")
    train(recipe, out)
    after = generated()
    assert before != after  # control
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    printed = capsys.readouterr().out
    found = lines_of(out / "predictions.jsonl")
    assert [line["untrained"]["ids"] for line in found] == before
    assert [line["ids"] for line in found] == after
    assert "accuracy_normalised" in printed
    figures = json.loads((out / "eval.json").read_text())
    assert figures["trained"]["step"] == 3
    assert figures["backend"] == PROGRAM.removesuffix("train")
    # The loss alone is that of the table, in the line that it always was.
    assert main(["eval", *words[:3], "--loss-only"]) == 0
    loss = figures["trained"]["heldout_loss"]
    assert capsys.readouterr().out == f"held-out loss {loss:.6f} of {out} at step 3\n"
    # Beside a checkpoint as well, the model that the recipe starts from is measured where that is asked.
    assert main(["eval", *words[:3], "--loss-only", "--untrained"]) == 0
    loss = figures["untrained"]["heldout_loss"]
    assert capsys.readouterr().out == f"held-out loss {loss:.6f} of the starting weights\n"


@pytest.mark.parametrize("method", [LORA, PROMPT], ids=["lora", "prompt"])
def test_a_choice_has_the_probability_that_the_logits_say(make_recipe, method):
    recipe = make_recipe(method=method, precision=FP64)
    state, run = start_state(recipe), resolve(recipe)
    choice = Choice("", (1, 7, 9, 30, 4, 11), 3)
    batch, _ = batch_of([choice.ids], limit=128, count=1)
    shifted = logits(state, batch)[0, : len(choice.ids) - 1]
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    wanted = log_probs[np.arange(len(shifted)), choice.ids[1:]]
    found = log_likelihood(BACKEND, state, run, choice)
    assert found == pytest.approx(wanted[choice.first - 1 :].sum(), abs=1e-10)
    assert found != pytest.approx(wanted[choice.first :].sum(), abs=1e-3)  # control: a token less


def test_a_resumed_run_has_the_samples_of_one_that_was_not_stopped(make_recipe, heldout: str, tmp_path: Path):
    def recipe(**run):
        return make_recipe(
            method=FULL, precision=FP64, data={"heldout": heldout}, optimizer={"lr": 0.05},
            run={"steps": 4, "eval_every_steps": 1, "eval_generations": 2} | run, checkpoint={"every_steps": 2},
        )  # fmt: skip

    train(recipe(), tmp_path / "whole")
    whole = lines_of(tmp_path / "whole/samples.jsonl")
    assert [line["step"] for line in whole] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [line["prompt"] for line in whole[:2]] == ["What is a list?", "Why?"]
    assert [line["reference"] for line in whole[:2]] == ["Items.", "So."]
    assert len({line["text"] for line in whole}) > 1
    train(recipe(stop_after_steps=2), tmp_path / "parts")
    # As a kill leaves it: an update after the checkpoint, and half a line.
    samples = tmp_path / "parts/samples.jsonl"
    with samples.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole[4]) + '\n{"step": 3, "prompt": "}')
    train(recipe(), tmp_path / "parts", resume=True)
    assert lines_of(samples) == whole


def test_answers_need_heldout_prompts(make_recipe, tmp_path: Path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(make_recipe().to_yaml())
    command = [str(file), "--out", str(tmp_path / "run")]
    for words, said in {
        (
            "train",
            *command,
            "--set",
            "run.eval_generations=1",
        ): "without data.heldout there are no held-out prompts",
        ("eval", *command): "data.heldout: not given",
        ("eval", *command, "--examples", "0"): "--examples 0: give 1 or more",
        ("eval", *command, "--examples", "1", "--loss-only"): "--examples: has no effect with --loss-only",
        (
            "eval",
            *command,
            "--max-tokens",
            "5",
            "--loss-only",
        ): "--max-tokens: has no effect with --loss-only",
    }.items():
        assert main([*words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
