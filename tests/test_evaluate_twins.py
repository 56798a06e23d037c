"""Both backends measure the same: every task, trained and untrained, in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from many import run_many
from small import ROOT

FP64 = {"policy": "fp64", "reduce": "fp64"}
TASKS = {
    "question_answering": ("choices-heldout.jsonl", "en"),
    "reading_comprehension": ("reading-heldout.jsonl", "en"),
    "summarisation": ("summarisation-heldout.jsonl", "en"),
    "translation": ("translation-heldout.jsonl", "zh"),
}
RECORDS = 6


@pytest.mark.full(minutes=5)
def test_both_backends_measure_the_same(make_recipe, tmp_path: Path):
    for task, (name, language) in TASKS.items():
        lines = (ROOT / "configs/data" / name).read_text(encoding="utf-8").split("\n")
        file = tmp_path / f"{task}.jsonl"
        file.write_text("\n".join(lines[:RECORDS]) + "\n", encoding="utf-8")
        data = {"train": str(file), "heldout": str(file), "task": task, "language": language}
        recipe = make_recipe(
            data=data | {"sequence_tokens": 400}, precision=FP64, optimizer={"lr": 0.05},
            run={"steps": 4, "eval_every_steps": 2, "eval_generations": 2},
        )  # fmt: skip
        (tmp_path / f"{task}.yaml").write_text(recipe.to_yaml())
    found = {}
    for program in ("jaxtrain", "torchtrain"):
        cases = []
        for task in TASKS:
            words = [str(tmp_path / f"{task}.yaml"), "--out", str(tmp_path / program / task)]
            cases += [["train", *words], ["eval", *words, "--max-tokens", "12"]]
        for case in run_many(program, cases, tmp_path / f"{program}-scratch"):
            assert case["code"] == 0, case
        found[program] = {task: left_in(tmp_path / program / task) for task in TASKS}
    for task, (figures, predictions, samples) in found["jaxtrain"].items():
        theirs, their_predictions, their_samples = found["torchtrain"][task]
        for model in ("untrained", "trained"):
            mine = {key: value for key, value in figures[model].items() if key != "of"}
            assert mine == pytest.approx({key: theirs[model][key] for key in mine}, rel=1e-9)
        assert figures["signatures"] == theirs["signatures"]
        assert figures["heldout"] == theirs["heldout"]
        assert tokens_of(predictions) == tokens_of(their_predictions)
        assert samples == their_samples
        assert len(samples) == 4
        # Control: training has changed what is compared.
        assert figures["trained"]["heldout_loss"] < figures["untrained"]["heldout_loss"]
        assert tokens_of(predictions) != [line["untrained"]["ids"] for line in predictions]
    mine, theirs = (likelihoods(found[program]["question_answering"][1]) for program in found)
    assert mine == pytest.approx(theirs, rel=1e-9)


PLANS = {
    "jaxtrain": ("plan.data=2 plan.tensor=2", "plan.pipe=2 plan.microbatches=2 plan.data=2"),
    "torchtrain": ("plan.data=2", "plan.tensor=2"),
}


@pytest.mark.full(minutes=6)
@pytest.mark.parametrize("program", PLANS)
def test_every_plan_measures_what_one_device_does(make_recipe, tmp_path: Path, program: str):
    """As commands: a plan's devices are a process's, or processes of their own, of which the first one alone prints and writes."""
    heldout = tmp_path / "heldout.jsonl"
    lines = (ROOT / "configs/data/choices-heldout.jsonl").read_text(encoding="utf-8").split("\n")
    heldout.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    data = {"train": str(heldout), "heldout": str(heldout)}
    file = tmp_path / "r.yaml"
    file.write_text(make_recipe(data=data, precision=FP64, optimizer={"lr": 0.05}).to_yaml())
    found = {}
    for plan in ("", *PLANS[program]):
        out = tmp_path / f"run {plan}"
        settings = [word for setting in plan.split() for word in ("--set", setting)]
        words = [str(file), "--out", str(out), *settings]
        extra = ["--set", "run.eval_generations=1"]
        for command in (["train", *words, *extra], ["eval", *words, "--max-tokens", "6", "--batch", "3"]):
            done = subprocess.run(
                [sys.executable, "-m", program, *command],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("accuracy_normalised") == 1
        found[plan] = left_in(out)
    figures, predictions, samples = found[""]
    for plan in PLANS[program]:
        assert samples == found[plan][2]
        assert tokens_of(predictions) == tokens_of(found[plan][1])
        assert likelihoods(predictions) == pytest.approx(likelihoods(found[plan][1]), rel=1e-9)
        assert figures["trained"]["heldout_loss"] == pytest.approx(
            found[plan][0]["trained"]["heldout_loss"], rel=1e-9
        )
    untrained = [choice for line in predictions for choice in line["untrained"]["choices"]]
    assert likelihoods(predictions) != pytest.approx(
        [c["log_likelihood"] for c in untrained], rel=1e-3
    )  # control


def likelihoods(predictions: list[dict]) -> list[float]:
    return [choice["log_likelihood"] for line in predictions for choice in line["choices"]]


def left_in(out: Path) -> tuple[dict, list[dict], list[dict]]:
    """The figures, the predictions and the samples of training."""
    predictions, samples = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").split("\n") if line]
        for name in ("predictions.jsonl", "samples.jsonl")
    )
    return json.loads((out / "eval.json").read_text(encoding="utf-8")), predictions, samples


def tokens_of(predictions: list[dict]) -> list[list[int]]:
    return [line["ids"] for line in predictions]
