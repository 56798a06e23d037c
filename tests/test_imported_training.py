"""An imported configuration trains as its tool does: five updates beside Hugging Face's Trainer, PEFT and DeepSpeed, on the same batches.

Axolotl and LLaMA-Factory cannot be installed beside us; both hand the Trainer its arguments, and `trainer_alone.py` does that
from the same files. Published configurations, made small: fewer tokens and examples, float32, no dropout, as masks are drawn
otherwise. The bound is that of docs/numerics.md for a loss in fp32, `T(N) U(nu) sigma` and the sum's own rounding: sigma is how far our
run in float32 is from ours in float64, which is what every run is held to.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from many import ROOT, run_many
from small import CACHE

from trainspec.cli import main

HOME = ROOT / "tests/trainspec/configurations"
STEPS, TOKENS = 5, 128
OURS = [
    "--devices", "1", "--set", "model.from=build/demo-model", "--set", "data.train=configs/data/qa-train.jsonl",
    "--set", f"data.cache={CACHE}", "--set", "data.task=question_answering", "--set", "data.too_long=skip",
]  # fmt: skip
# Of each tool a published configuration: its files, what is changed in each, and answers.
CASES: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "trl": (
        {
            "peft-sft-deepspeed/training_args.json": {
                "bf16": False, "packing": False, "max_length": TOKENS, "max_steps": STEPS, "warmup_steps": 2,
                "per_device_train_batch_size": 2,
            },
            "peft-sft-deepspeed/adapter_config.json": {"lora_dropout": 0.0},
            "peft-sft-deepspeed/deepspeed.json": {"bf16": {"enabled": False}},
        },
        ["--set", "data.loss_on=completion"],
    ),
    "llamafactory": (
        {"qwen3_lora_sft.yaml": {"bf16": False, "cutoff_len": TOKENS, "max_steps": STEPS, "warmup_ratio": 0.4}},
        ["--set", "data.chat_template=null"],
    ),
    "axolotl": (
        {
            "llama-2-fft_optimized.yaml": {
                "optimizer": "adamw_torch", "bf16": False, "sample_packing": False, "val_set_size": 0, "sequence_len": TOKENS,
                "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "warmup_ratio": 0.5,
            },
        },
        [],
    ),
}  # fmt: skip
# Runs of ours: the recipe, the same in float64, and without its warm-up, which must be seen.
EXACT = ["--set", "precision.policy=fp64", "--set", "precision.reduce=fp64"]
RUNS = {
    "fp32": [],
    "fp64": EXACT,
    "control": ["--set", "schedule.warmup_steps=0", "--set", "schedule.warmup_ratio=0"],
}
PROGRAMS = {"torchtrain": ("fp32", "fp64", "control"), "jaxtrain": ("fp32",)}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """The losses of every run, by tool: ours, and `alone`, the Trainer's."""
    home = tmp_path_factory.mktemp("imported")
    files = {tool: write_files(home, tool) for tool in CASES}
    for tool, paths in files.items():
        recipe = ["--out", str(home / f"{tool}.yaml"), *OURS, *CASES[tool][1]]
        assert main(["import", *map(str, paths), *recipe]) == 0
    for program, runs in PROGRAMS.items():
        lines = [
            [
                "train",
                str(home / f"{tool}.yaml"),
                *RUNS[run],
                "--out",
                str(out),
                "--trace",
                str(out / "trace"),
            ]
            for tool in CASES
            for run in runs
            for out in [home / tool / program / run]
        ]
        for result in run_many(program, lines, home / program):
            assert result["code"] == 0, result
    found = {}
    for tool, paths in files.items():
        traced = {
            f"{p} {r}": traced_losses(home / tool / p / r / "trace")
            for p, runs in PROGRAMS.items()
            for r in runs
        }
        found[tool] = traced | {
            "alone": train_alone(tool, home / tool / "torchtrain/fp32/trace", paths, home)
        }
    return found


def write_files(home: Path, tool: str) -> list[Path]:
    """The published files, changed as the case says."""
    paths = []
    for name, changes in CASES[tool][0].items():
        source = HOME / tool / name
        paths.append(home / f"{tool}-{source.name}")
        paths[-1].write_text(json.dumps(yaml.safe_load(source.read_text()) | changes))
        if source.suffix != ".json":  # JSON is YAML
            paths[-1] = paths[-1].rename(paths[-1].with_suffix(".yaml"))
    return paths


def traced_losses(trace: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (trace / "trace.jsonl").read_text().splitlines()]


def train_alone(tool: str, trace: Path, files: list[Path], home: Path) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = home / f"{tool}-losses.json"
    words = [tool, "build/demo-model", str(trace), str(out), *map(str, files)]
    command = [sys.executable, str(ROOT / "tests/trainer_alone.py"), *words]
    environment = os.environ | {"PORT": str(port), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def bound(found: dict[str, list[float]], step: int) -> float:
    """What float32 may do to the loss of a step: docs/numerics.md."""
    exact = found["torchtrain fp64"]
    errors = [mine - true for mine, true in zip(found["torchtrain fp32"], exact, strict=True)]
    sigma, count = math.sqrt(sum(error**2 for error in errors) / STEPS), STEPS
    tail = math.sqrt(2 * math.log(2 * STEPS / 1e-6))
    unsure = math.sqrt(count / 2) * (1e-6 * math.gamma(count / 2 + 1)) ** (-1 / count)
    summed = 2**-24 * math.sqrt(1 + 8 * TOKENS / 2) * exact[step]
    return tail * (unsure * sigma + summed)


@pytest.mark.full
@pytest.mark.parametrize("run", ["alone", "torchtrain fp32", "jaxtrain fp32"])
@pytest.mark.parametrize("tool", CASES)
def test_losses_are_those_of_the_tool(losses: dict[str, dict[str, list[float]]], tool: str, run: str):
    found = losses[tool]
    assert len(found[run]) == STEPS
    for step, (loss, true) in enumerate(zip(found[run], found["torchtrain fp64"], strict=True)):
        assert abs(loss - true) <= bound(found, step), (step + 1, found)


@pytest.mark.full
@pytest.mark.parametrize("tool", CASES)
def test_a_recipe_without_their_warm_up_is_seen(losses: dict[str, dict[str, list[float]]], tool: str):
    """The control: our default in place of the configuration's warm-up."""
    found = losses[tool]
    far = [
        abs(a - b) / bound(found, i)
        for i, (a, b) in enumerate(zip(found["torchtrain control"], found["alone"], strict=True))
    ]
    assert far[0] <= 2  # before the first update both have the same weights
    assert max(far[1:]) > 10
