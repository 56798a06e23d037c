"""Both backends say the same: greedy and drawn, of every family and method, whatever the batch, under every kind of plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from many import run_many
from method_sections import sections
from small import QA

from parity.runs.launch_many import Case, run_cases
from trainspec.plans.plan import Backend

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


MANY, TOKENS = 100, 64
VARIANTS = (
    "plain",
    "tied",
    "qwen3",
    "qwen2",
    "mistral",
    "smollm3",
    "glm",
    "chatglm2",
    "llama3-rope",
    "yarn-rope",
)
DRAWN = {
    "drawn": ["--temperature", "1", "--seed", "3"],
    "filtered": ["--temperature", "0.9", "--top-k", "60", "--top-p", "0.95", "--seed", "3"],
    "penalised": ["--temperature", "1.2", "--min-p", "0.02", "--repetition-penalty", "1.2", "--seed", "3"],
    "another seed": ["--temperature", "1", "--seed", "4"],
}
# Those of the registry, so that a new one is here by itself; their dropout must not show.
METHODS = {name: method for name, method in sections({}).items() if method["kind"] != "full"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of MANY different prompts."""
    file, lines = tmp_path / "prompts.jsonl", QA.read_text(encoding="utf-8").splitlines()[:MANY]
    assert len(set(lines)) == MANY
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def said_by_both(
    directory: Path, prompts: Path, cases: dict[str, list[str]], before: Sequence[list[str]] = ()
) -> dict[str, list[list[int]]]:
    """What both programs generate, the ids of every prompt by case, which is checked to be the same.

    A case is words after `generate`, with its own directory in `directory`. Commands `before` are torchtrain's, which runs first.
    """
    said = []
    for program, first in (("torchtrain", before), ("jaxtrain", ())):
        how = ["--file", str(prompts), "--max-tokens", str(TOKENS), "--batch", "25"]
        commands = [
            ["generate", "--out", str(directory / name), *how, *words] for name, words in cases.items()
        ]
        for case in run_many(program, [*first, *commands], directory / f"{program}-scratch"):
            assert case["code"] == 0, case
        files = {name: directory / name / "generations.jsonl" for name in cases}
        said.append(
            {
                name: [json.loads(line)["ids"] for line in file.read_text().splitlines()]
                for name, file in files.items()
            }
        )
        for file in files.values():
            file.unlink()
    for name in cases:
        different = [i for i, (a, b) in enumerate(zip(said[0][name], said[1][name], strict=True)) if a != b]
        assert not different, f"{name}: prompts {different}"
        assert len(said[0][name]) == MANY
    return said[0]


@pytest.mark.full(minutes=4)
def test_both_backends_draw_the_same_tokens_for_many_prompts(make_recipe, tmp_path: Path, prompts: Path):
    file = tmp_path / "r.yaml"
    file.write_text(make_recipe(precision={"policy": "fp64", "reduce": "fp64"}).to_yaml())
    cases = {name: [str(file), "--untrained", *words] for name, words in DRAWN.items()}
    said = said_by_both(tmp_path, prompts, cases)
    for name in ("filtered", "penalised", "another seed"):  # controls: the settings and the seed are read
        assert sum(a != b for a, b in zip(said["drawn"], said[name], strict=True)) > 90
    assert len({tuple(ids) for ids in said["drawn"]}) > 90
    assert max(map(len, said["drawn"])) == TOKENS


@pytest.mark.full(minutes=8)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_both_backends_say_the_same_of_every_family(
    make_recipe, tmp_path: Path, prompts: Path, precision: str
):
    """Greedy; `tests/torchtrain/test_greedy.py` holds torchtrain's to transformers'."""
    cases = {}
    for variant in VARIANTS:
        file = tmp_path / f"{variant}.yaml"
        recipe = make_recipe(variant, precision={"policy": precision}, data={"sequence_tokens": 64})
        file.write_text(recipe.to_yaml())
        cases[variant] = [str(file), "--untrained"]
    cases["alone"] = [*cases["plain"], "--batch", "1"]
    said = said_by_both(tmp_path, prompts, cases)
    assert said["alone"] == said["plain"]
    assert len({json.dumps(said[variant]) for variant in VARIANTS}) == len(VARIANTS)  # control


@pytest.mark.full(minutes=6)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_both_backends_say_the_same_with_a_trained_adapter(
    make_recipe, tmp_path: Path, prompts: Path, precision: str
):
    """Greedy, of checkpoints that torchtrain wrote."""
    cases, trained = {}, []
    for kind, method in METHODS.items():
        file = tmp_path / f"{kind}.yaml"
        recipe = make_recipe(method=method, optimizer={"lr": 0.05}, precision={"policy": precision})
        file.write_text(recipe.to_yaml())
        trained.append(["train", str(file), "--out", str(tmp_path / kind)])
        cases[kind] = [str(file)]
    cases["untrained"] = [cases["lora"][0], "--untrained"]
    said = said_by_both(tmp_path, prompts, cases, before=trained)
    for kind in METHODS:  # control: it was trained away from its start
        assert said[kind] != said["untrained"], kind
        assert max(map(len, said[kind])) == TOKENS
    assert len({json.dumps(said[kind]) for kind in METHODS}) == len(METHODS)


# By name the plan, and its devices. A pipeline has no cache.
PLANS = {
    "one": ({}, 1),
    "data": ({"data": 2}, 2),
    "tensor": ({"tensor": 2}, 2),
    "shards": ({"fsdp": 2, "shards": "params"}, 2),
    "pipe": ({"pipe": 2, "microbatches": 2}, 2),
}


@pytest.mark.full(minutes=4)
@pytest.mark.parametrize(("backend", "policy"), [("jax", "fp64"), ("torch", "fp32")])
def test_every_plan_says_what_one_device_says(
    make_recipe, tmp_path: Path, prompts: Path, backend: Backend, policy: str
):  # DeepSpeed has no float64
    """As commands, of checkpoints that were trained under the plan; with two processes the first alone prints and writes."""
    cases, outs = [], {}
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(prompts.read_text(encoding="utf-8").splitlines()[:5]) + "\n", encoding="utf-8")
    for name, (plan, devices) in PLANS.items():
        file, outs[name] = tmp_path / f"{name}.yaml", tmp_path / name
        recipe = make_recipe(
            method=METHODS["prefix"], plan=plan, optimizer={"lr": 0.05}, precision={"policy": policy}
        )
        file.write_text(recipe.to_yaml())
        words = [str(file), "--out", str(outs[name])]
        answer = ["generate", *words, "--file", str(few), "--max-tokens", "24", "--batch", "4"]
        cases += [Case(("train", *words), devices), Case(tuple(answer), devices)]
    ended = run_cases(backend, cases, home=tmp_path / "launches")
    assert not (wrong := [result.wrong for result in ended if result.wrong]), wrong
    said = {name: (out / "generations.jsonl").read_text(encoding="utf-8") for name, out in outs.items()}
    ids = {name: [json.loads(line)["ids"] for line in lines.splitlines()] for name, lines in said.items()}
    assert len(ids["one"]) == 5
    assert all(found == ids["one"] for found in ids.values()), ids
    for result in ended[1::2]:
        assert result.printed.count("wrote") == 1, result.printed
