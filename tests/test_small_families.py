"""`make model FAMILY=...`: small real models of the other families, made by transformers, are read as what they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT

from trainspec.files.hf import read_model
from trainspec.files.model_config import config_notes, read_model_spec
from trainspec.params import param_table

SCRIPT = ROOT / "scripts/make_demo_model.py"
# What a published model of the family has otherwise than a Llama.
RULES = {
    "qwen2": {"attention_bias": True, "tied_embeddings": True, "norm_eps": 1e-6},
    "qwen3": {"tied_embeddings": True, "norm_eps": 1e-6},
    "mistral": {"window": 64},
    "smollm3": {"unrotated": (3,), "tied_embeddings": True},
    "glm": {"rotary_share": 0.5, "attention_bias": True, "norm_eps": 1.5625e-7},
}
FAST = "glm"


def make(out: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == FAST else pytest.mark.full) for f in RULES]
)
def test_a_family_is_made_and_read(tmp_path: Path, family: str):
    steps = "0" if family == FAST else "60"
    said = make(tmp_path / "model", "--family", family, "--steps", steps)
    spec = read_model_spec(tmp_path / "model")
    assert spec.family == family
    assert {name: getattr(spec, name) for name in RULES[family]} == RULES[family]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config_notes(config, where="x") == []
    names = [p.name for p, _ in read_model(tmp_path / "model", spec, param_table(spec), dtype=None)]
    assert names == [p.name for p in param_table(spec)]
    if steps != "0":  # it has learnt something
        first, last = map(float, re.findall(r"(\d+\.\d+) -> (\d+\.\d+)", said)[0])
        assert last < first - 1


def test_every_family_that_transformers_has_is_offered():
    (table,) = re.findall(r"^FAMILIES.*?^}", SCRIPT.read_text(), flags=re.M | re.S)
    offered = re.findall(r'^    "(\w+)": ', table, flags=re.M)
    assert set(offered) == {"llama", *RULES}
    makefile = (ROOT / "Makefile").read_text()
    assert all(family in makefile for family in offered)


@pytest.mark.full
def test_settings_of_a_llama_are_refused_for_others(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "x"), "--family", "glm", "--tied"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--tied, --bias and --rope are a Llama's" in done.stderr
