"""Both backends say the same: greedy and drawn, whatever the batch, under several plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from many import run_many
from small import QA

SETTINGS = {
    "greedy": [],
    "drawn": ["--temperature", "1", "--seed", "3"],
    "filtered": ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "50", "--repetition-penalty", "1.1"],
    "one at a time": ["--temperature", "1", "--seed", "3", "--batch", "1"],
}


@pytest.mark.full
def test_both_backends_generate_the_same_tokens(make_recipe, tmp_path: Path):
    file, prompts = tmp_path / "r.yaml", tmp_path / "p.jsonl"
    file.write_text(make_recipe(precision={"policy": "fp64", "reduce": "fp64"}).to_yaml())
    prompts.write_text("\n".join(QA.read_text(encoding="utf-8").splitlines()[:10]) + "\n", encoding="utf-8")
    said = {}
    for program in ("jaxtrain", "torchtrain"):
        outs = {name: tmp_path / program / name.replace(" ", "-") for name in SETTINGS}
        cases = [
            [
                "generate",
                str(file),
                "--out",
                str(outs[name]),
                "--file",
                str(prompts),
                "--max-tokens",
                "20",
                "--untrained",
                *words,
            ]
            for name, words in SETTINGS.items()
        ]
        for case in run_many(program, cases, tmp_path / f"{program}-scratch"):
            assert case["code"] == 0, case
        said[program] = {
            name: [json.loads(line)["ids"] for line in (out / "generations.jsonl").read_text().splitlines()]
            for name, out in outs.items()
        }
    assert said["jaxtrain"] == said["torchtrain"]
    ours = said["jaxtrain"]
    assert ours["drawn"] == ours["one at a time"]
    assert ours["greedy"] != ours["drawn"] != ours["filtered"]  # control
    assert len({tuple(ids) for ids in ours["drawn"]}) == 10
