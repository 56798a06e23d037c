"""What earlier commits wrote is still read: a trace, an adapter, a whole model, and a checkpoint of several processes.

The first three are of one run of commit 332f762 in fp64: LoRA of rank 1 on the query projections of a model of 6,120 parameters,
two updates; its checkpoint is in test_identity. The last is of commit 2501004: torchtrain with ZeRO-3 in two processes, three
updates in fp32, and the adapter that was exported of it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many import run_many
from safetensors.numpy import load_file, save_file
from small import QA, ROOT, SMALL, write_checkpoint, write_tokenizer

from parity.cli import main
from trainspec.checkpoints.checkpoint import load
from trainspec.cli import main as trainspec
from trainspec.files.adapters import read_adapter
from trainspec.files.hf import read_model
from trainspec.files.model_config import read_model_spec
from trainspec.methods import trainable_table
from trainspec.methods.lora import LoRA
from trainspec.params import param_table
from trainspec.recipe import load_recipe
from trainspec.runs.run import resolve

STORED = ROOT / "tests/stored"
SHARDED = STORED / "sharded-2501004"
NEXT_LOSSES = [6.25675, 6.25891]
METHOD = LoRA(rank=1, alpha=2.0, targets=("q_proj",))
STEPS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the run started from."""
    spec = replace(SMALL, name="base", embed=8, heads=2, kv_heads=1, head_dim=4, mlp=12)
    return write_checkpoint(tmp_path_factory.mktemp("base"), spec)


def model_weights(directory: Path) -> dict[str, np.ndarray]:
    spec = read_model_spec(directory)
    return {p.name: w[...] for p, w in read_model(directory, spec, param_table(spec), dtype="float64")}


def test_an_adapter_and_the_model_it_was_merged_into(base: Path):
    spec = read_model_spec(base)
    table = trainable_table(spec, METHOD)
    adapter = {
        p.name: w[...]
        for p, w in read_adapter(STORED / "adapter-332f762", spec, METHOD, table, dtype="float64")
    }
    assert len(adapter) == 4
    merged = model_weights(STORED / "merged-332f762")
    for name, weight in model_weights(base).items():
        if name.endswith("q_proj.weight"):
            stem = "base_model.model." + name.removesuffix(".weight")
            added = 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            assert np.abs(added).max() > 1e-3
            weight = weight + added
        assert merged[name] == pytest.approx(weight, abs=1e-7), name  # stored in float32


def test_a_checkpoint_of_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, out = SHARDED / "checkpoints/step-000003", tmp_path / "adapter"
    assert trainspec(["checkpoint", "verify", str(SHARDED)]) == 0
    assert len(list(checkpoint.glob("weights-*-of-00002.safetensors"))) == 2
    write_tokenizer(tmp_path)
    argv = [
        "checkpoint",
        "consolidate",
        str(SHARDED),
        "--out",
        str(out),
        "--set",
        f"data.tokenizer={tmp_path}",
    ]
    assert trainspec(argv) == 0, capsys.readouterr()
    wanted, found = (load_file(d / "adapter_model.safetensors") for d in (SHARDED / "adapter", out))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert all(array.any() for array in wanted.values())
    loaded = load(checkpoint, resolve(load_recipe(SHARDED / "recipe.yaml")))
    assert loaded.step == 3
    for name, moment in loaded.moment2.items():
        assert moment[...].shape == wanted[name].shape
        assert (moment[...] >= 0).all()
        assert moment[...].any(), name


@pytest.mark.full
@pytest.mark.parametrize("program", ["jaxtrain", "torchtrain"])
def test_a_checkpoint_of_two_processes_is_resumed(program: str, tmp_path: Path):
    """In one process, on either backend; its next losses are known."""
    shutil.copytree(SHARDED, tmp_path / "run")
    write_tokenizer(tmp_path)
    changes = (f"data.tokenizer={tmp_path}", f"data.cache={tmp_path}/c", "plan.fsdp=1", "plan.shards=nothing",
               "run.stop_after_steps=5")  # fmt: skip
    words = ["train", str(SHARDED / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume"]
    words += [word for change in changes for word in ("--set", change)]
    [result] = run_many(program, [words], tmp_path / "scratch")
    assert result["code"] == 0, result
    assert "resuming after step 3 of 5" in result["out"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(NEXT_LOSSES, abs=1e-4)


def test_a_trace(tmp_path: Path):
    trace, changed = STORED / "trace-332f762", tmp_path / "changed"
    assert main(["diff", str(trace), str(trace), "--out", str(tmp_path / "same")]) == 0
    shutil.copytree(trace, changed)
    tensors = load_file(changed / "step-000002.safetensors")
    name = next(name for name in tensors if name.startswith("gradient"))
    tensors[name] = tensors[name] * (1 + 1e-6)
    save_file(tensors, changed / "step-000002.safetensors")
    assert main(["diff", str(trace), str(changed), "--out", str(tmp_path / "other")]) == 1


@pytest.mark.full
@pytest.mark.parametrize("program", ["jaxtrain", "torchtrain"])
def test_a_run_is_what_it_was(program: str, base: Path, tmp_path: Path):
    settings: dict[str, Any] = {
        "model": {"from": str(base)},
        "method": METHOD.model_dump(),
        "data": {
            "train": str(QA),
            "sequence_tokens": 160,
            "cache": str(tmp_path / "cache"),
            "too_long": "skip",
        },
        "batch": {"global_examples": 2},
        "precision": {"policy": "fp64", "reduce": "fp64"},
        "optimizer": {"lr": 0.01},
        "schedule": {"kind": "linear"},
        "run": {"steps": STEPS},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    words = [
        "train",
        str(tmp_path / "r.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--trace",
        str(tmp_path / "t"),
    ]
    [result] = run_many(program, [words], tmp_path / "scratch")
    assert result["code"] == 0, result
    stored = str(STORED / "trace-332f762")
    assert main(["diff", stored, str(tmp_path / "t"), "--out", str(tmp_path / "diff")]) == 0
