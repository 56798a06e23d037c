"""A run survives a kill, and goes on: on its own backend bit by bit, on the other one within the proof's bound."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from many import run_many
from safetensors.numpy import load_file
from small import ROOT, recipe_maker

from trainspec import checkpoint

PROGRAMS = ("jaxtrain", "torchtrain")
# Many, so that a kill behind the first checkpoint comes long before the end.
STEPS = 30
LAST = f"step-{STEPS:06d}"
PARTS = ("weights", "moment1", "moment2")


@pytest.fixture
def recipe_file(model_dirs, tmp_path: Path) -> Path:
    recipe = recipe_maker(model_dirs, tmp_path / "cache")(
        method={"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"},
        precision={"policy": "fp64", "reduce": "fp64"},
        schedule={"kind": "linear", "warmup_steps": 2},
        checkpoint={"every_steps": 2, "keep": 2},
        run={"steps": STEPS},
    )
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    return file


def ends(out: Path) -> dict[str, dict[str, np.ndarray]]:
    assert checkpoint.latest(out) == out / "checkpoints" / LAST
    return {part: load_file(out / "checkpoints" / LAST / f"{part}.safetensors") for part in PARTS}


def run(program: str, scratch: Path, *argvs: list[str]) -> None:
    for argv, result in zip(argvs, run_many(program, list(argvs), scratch), strict=True):
        assert result["code"] == 0, f"{argv}: {result}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_was_killed_goes_on_bit_by_bit(program: str, recipe_file: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(program, tmp_path / "a", ["train", str(recipe_file), "--out", str(whole)])
    command = [sys.executable, "-m", program, "train", str(recipe_file), "--out", str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while checkpoint.latest(killed) is None and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    saved = checkpoint.latest(killed)
    assert saved is not None
    assert saved.name != LAST, "it ended before it was killed: give it more steps"
    run(program, tmp_path / "b", ["train", str(recipe_file), "--out", str(killed), "--resume"])
    left, right = ends(whole), ends(killed)
    for part in PARTS:
        assert all(np.array_equal(array, right[part][name]) for name, array in left[part].items()), part
    assert [line.split(",")[0] for line in (killed / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {i}' for i in range(1, STEPS + 1)
    ]


def test_a_run_goes_on_on_the_other_backend(recipe_file: Path, tmp_path: Path):
    recipe, homes = str(recipe_file), {name: tmp_path / name for name in ("jax", "there", "back")}
    first = ["--set", "run.stop_after_steps=10"]
    run(
        "jaxtrain",
        tmp_path / "a",
        ["train", recipe, "--out", str(homes["jax"])],
        ["train", recipe, "--out", str(homes["there"]), *first],
    )
    run(
        "torchtrain",
        tmp_path / "b",
        ["train", recipe, "--out", str(homes["there"]), "--resume"],
        ["train", recipe, "--out", str(homes["back"]), *first],
    )
    run("jaxtrain", tmp_path / "c", ["train", recipe, "--out", str(homes["back"]), "--resume"])
    wanted = ends(homes["jax"])
    for name in ("there", "back"):
        found = ends(homes[name])
        for part in PARTS:
            for tensor, array in wanted[part].items():
                distance = np.abs(found[part][tensor] - array).max()
                assert distance <= 1e-9 * np.abs(array).max(), f"{name}: {part}/{tensor}"
