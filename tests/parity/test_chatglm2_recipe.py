"""The recipe of ChatGLM2's P-Tuning v2 by its small twin: from its own tokenizer files to a prefix by its own names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import chatglm2
import pytest
from safetensors.numpy import load_file
from small import ROOT

from parity.cli import main

RECIPE = ROOT / "configs/chatglm2-6b-ptuning-v2.yaml"


@pytest.mark.full
def test_its_small_twin_holds_and_its_export_starts_another_run(tmp_path: Path):
    home = tmp_path / "chatglm2"
    chatglm2.write_sentencepiece(home)
    # Room for the pieces and the special tokens after them.
    (home / "config.json").write_text(json.dumps(chatglm2.CONFIG | {"padded_vocab_size": 451}))
    (home / "tokenization_chatglm.py").write_text("raise SystemExit('this was run')")
    words = ["--small", "--set", f"model.from={home}", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["check", str(RECIPE), *words]) == 0

    twin, run = str(tmp_path / "out/small/recipe.yaml"), str(tmp_path / "run")

    def command(module: str, verb: str, *more: str) -> None:
        words = [sys.executable, "-m", module, verb, twin, "--set", "run.steps=1", *more]
        subprocess.run(words, check=True, cwd=ROOT)

    command("jaxtrain", "train", "--out", run)
    command("torchtrain", "export", "--out", run)
    (name,) = load_file(f"{run}/adapter/model.safetensors")
    assert name == "transformer.prefix_encoder.embedding.weight"
    assert (tmp_path / "run/adapter/tokenizer.model").is_file()
    command("torchtrain", "train", "--set", f"method.adapter={run}/adapter", "--out", f"{run}-again")
