"""Whole runs: resume, the program as a user starts it, and adapters that PEFT loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backend import PROGRAM, evaluate, main, train
from small import ROOT
from test_model import FP64, FULL, LORA

MEASURED = {"heldout": str(ROOT / "configs/data/qa-heldout.jsonl")}
FP32 = {"policy": "fp32", "reduce": "fp32"}
# What is measured of an update's time; the first update has no speed.
SPEED = {"tokens_per_second", "all_tokens_per_second", "model_tflops_per_second", "input_share"}
TIMES = {"seconds", "checkpoint_seconds", *SPEED}


def metrics_of(out: Path):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        pytest.param(LORA, FP32, id="lora-fp32"),
        pytest.param(FULL, FP64, id="full-fp64", marks=pytest.mark.full),
        pytest.param(LORA, FP64, id="lora-fp64", marks=pytest.mark.full),
        pytest.param(FULL, FP32, id="full-fp32", marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_is_the_same_run(make_recipe, tmp_path, method, precision):
    def recipe(**run):
        return make_recipe(
            method=method,
            precision=precision,
            data=MEASURED,
            batch={"accumulation": 2},
            schedule={"kind": "cosine", "warmup_steps": 1},
            checkpoint={"every_steps": 3},
            run={"steps": 5, "eval_every_steps": 2} | run,
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe(), out=whole)
    train(recipe(stop_after_steps=3), out=parts)
    train(recipe(), out=parts, resume=True)
    left, right = (
        sorted((path / "checkpoints/step-000005").glob("*.safetensors")) for path in (whole, parts)
    )
    assert len(left) == len(right) == 3
    for one, other in zip(left, right, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    wanted = [row for row in metrics_of(whole)]
    found = metrics_of(parts)
    found[2].pop("heldout_loss")  # step 3 was the last of the first part, so it measured
    assert found == wanted


def test_the_program_as_a_person_starts_it(make_recipe, tmp_path):
    recipe = make_recipe(method=LORA, data=MEASURED, batch={"accumulation": 2}, run={"steps": 2})
    file, out = tmp_path / "small.yaml", tmp_path / "run"
    file.write_text(recipe.to_yaml())
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    command = [
        sys.executable,
        "-m",
        PROGRAM,
        "train",
        file,
        "--out",
        out,
        "--trace",
        tmp_path / "trace",
        "--timings",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    wrote = lines.index(f"wrote {out / 'checkpoints/step-000002'}")
    *first, model, data, length, one, two, speed = lines[:wrote]
    assert first[-1] == f"writes: {out}"
    assert "lora trains" in model
    assert "records" in data
    assert length.startswith("2 updates: ")
    assert [line.split()[:2] for line in (one, two)] == [["step", "1"], ["step", "2"]]
    assert "first update" in one
    assert "held-out" in two
    assert re.match(
        r"after the first update: [\d,]+ target tokens/s  [\d,]+ tokens/s  .* TFLOP/s  input ", speed
    )
    check_times(out, lines[wrote + 1 :])
    assert len(list((tmp_path / "trace").glob("step-*.safetensors"))) == 2
    if Path("/dev/shm").is_dir():
        assert not {name for name in set(os.listdir("/dev/shm")) - shared if "deepspeed" in name}


def check_times(out: Path, printed: list[str]) -> None:
    """What `--timings` says: the laps to the first update, in their order, and all that a later one is made of."""
    first, second = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert first.keys() & TIMES == {"seconds"}
    assert second["checkpoint_seconds"] > 0  # it is the last
    assert second.keys() & TIMES == TIMES
    timings = json.loads((out / "timings.json").read_text())
    laps = {lap["what"]: lap for lap in timings["laps"]}
    loaded = {"jaxtrain": "JAX loaded", "torchtrain": "torch loaded"}[PROGRAM]
    assert list(laps) == [
        "recipe read and checked", loaded, "devices and processes", "data opened",
        "starting weights read", "first update",
    ]  # fmt: skip
    assert all(lap["seconds"] > 0 for lap in laps.values())
    parts, observers = laps["first update"]["of_which"], {"trace", "evaluation", "checkpoint", "report"}
    compiling = {"traced", "lowered", "compiled"} if PROGRAM == "jaxtrain" else set()
    assert set(parts) == compiling | observers
    for names in (compiling, observers):  # an evaluation is compiled, too
        assert laps["first update"]["seconds"] > max(first["seconds"], sum(parts[name] for name in names))
    spans = ["input", "agreement", "weights read", "update", "trace", "evaluation", "checkpoint", "report"]
    assert list(timings["per_update"]) == spans
    assert timings["per_update"]["update"]["total"] == pytest.approx(second["seconds"])
    assert printed[0].startswith("to the end of the first update ")
    assert [line.split("  ")[1] for line in printed[-len(spans) :]] == spans


def test_exit_codes(make_recipe, tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(make_recipe(method=FULL, precision=FP64, run={"steps": 4}).to_yaml())
    assert main(["train", str(file), "--out", str(tmp_path / "a"), "--set", "plan.tensor=3"]) == 2
    assert main(["train", str(file), "--out", str(tmp_path / "b"), "--set", "optimizer.lr=1e200"]) == 1
    assert "stopped before the update" in capsys.readouterr().err


def test_evaluation_measures_the_newest_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe(
        method=FULL, data=MEASURED, optimizer={"lr": 1e-2}, run={"steps": 2, "eval_every_steps": 1}
    )
    start = evaluate(recipe, out=tmp_path / "nothing", examples=1, untrained=True)
    assert "trained" not in start
    train(recipe, out=tmp_path / "run")
    measured = evaluate(recipe, out=tmp_path / "run", examples=1)
    assert measured["untrained"] == start["untrained"]
    assert measured["trained"]["of"].endswith("at step 2")
    loss = metrics_of(tmp_path / "run")[-1]["heldout_loss"]
    assert loss == measured["trained"]["heldout_loss"] != start["untrained"]["heldout_loss"]
