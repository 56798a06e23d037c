"""`parity generate` with both backends: exit codes, a pass with how much to spare, a planted difference, files, the mistakes of a user."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from many import run_many

from parity.generate import PromptRequest
from parity.runs.answers import ONE_AT_A_TIME, Answers
from parity.runs.fixture import write_tiny
from parity.runs.progress import Progress
from parity.runs.responses import count_records, link_newest, write_own_prompts
from trainspec.errors import DataError, UserError
from trainspec.generation.choice import Sampling
from trainspec.generation.request import Settings
from trainspec.recipe import Data


def test_the_options_of_the_sides_are_those_that_differ_from_the_usual():
    assert PromptRequest("What?", None, Settings()).words(None) == ["--prompt=What?"]
    assert PromptRequest("-x", None, Settings()).words(None) == ["--prompt=-x"]
    sampling = Sampling(temperature=0.5, top_k=3, seed=4)
    asked = PromptRequest(None, Path("p.jsonl"), Settings(20, ("END",), sampling, 2, caches=False))
    assert asked.words(Path("own.jsonl")) == [
        "--file=p.jsonl", "--max-tokens", "20", "--batch", "2", "--temperature", "0.5", "--top-k", "3", "--seed", "4",
        "--stop=END", "--no-cache",
    ]  # fmt: skip


def test_own_prompts_are_the_first_of_the_held_out_data(tmp_path: Path):
    train, heldout = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text('{"prompt": "x", "completion": "y"}\n')
    heldout.write_text("".join(f'{{"prompt": "{n}", "completion": "é"}}\n' for n in range(20)))
    data = Data.model_validate({"train": str(train), "heldout": str(heldout), "sequence_tokens": 8})
    path, said = write_own_prompts(data, tmp_path / "out")
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == [
        str(n) for n in range(8)
    ]
    assert said == f"the first 8 records of the held-out data, {heldout}"
    alone = data.model_copy(update={"heldout": None})
    assert (
        write_own_prompts(alone, tmp_path / "out")[1] == f"the first 1 records of the training data, {train}"
    )
    text = tmp_path / "t.txt"
    text.write_text("word " * 100 + "\n")
    plain = data.model_copy(update={"heldout": str(text), "task": "text"})
    path, _ = write_own_prompts(plain, tmp_path / "out")
    assert len(json.loads(path.read_text().splitlines()[0])["text"]) == 120
    heldout.write_text("{not json\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        write_own_prompts(data, tmp_path / "out")


def test_the_newest_checkpoint_is_linked(tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoint"):
        link_newest(tmp_path, tmp_path / "out")
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-00000{step}").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("of the run")
    link_newest(tmp_path, tmp_path / "out")
    assert (tmp_path / "out/recipe.yaml").read_text() == "of the run"
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]


SIDES = (("left", "jax"), ("right", "torch plan.data=2"))


def test_progress_is_that_of_a_check_in_responses():
    stream, clock = io.StringIO(), [0.0]
    progress = Progress(stream, watched=False, clock=lambda: clock[0])
    answers = Answers("r.yaml", SIDES, 24, 128, "bf16", draws=8, at_once=True)
    progress.planned(answers)
    for name in ("left", "right"):
        progress.started(name, 1)
        progress.said(name, "generating with the starting weights")
    assert stream.getvalue() == ""  # so that a mistake of the user is one line
    for at, count in ((20.0, 8), (40.0, 16)):
        clock[0] = at
        progress.said("left", f"{count} of 24 responses")
    progress.said("left", "wrote out/left/run/generations.jsonl: 24 responses, 3 ended by themselves")
    progress.ended("left")
    progress.said("right", "wrote out/right/run/generations.jsonl: 24 responses, 3 ended by themselves")
    progress.ended("right")
    progress.started("reference", 3)
    for at, count in ((60.0, 12), (80.0, 24)):
        clock[0] = at
        progress.said("reference", f"reference: {count} of 24 responses")
    progress.ended("reference")
    progress.comparing()
    assert stream.getvalue().splitlines() == [
        "parity: r.yaml: 24 responses of at most 128 tokens each on each side, in bf16",
        "parity: left (jax) and right (torch plan.data=2) at the same time, then the float64 reference: every response once, and 8 "
        "times more with roundings",
        "parity: left 8/24 responses, right starting; 20 s so far",
        "parity: left 16/24 responses, right starting; 40 s so far",
        "parity: left done, right starting; 40 s so far",
        "parity: left done, right done; 40 s so far",
        "parity: left done, right done, reference 12/24 responses; 60 s so far",
        "parity: left done, right done, reference 24/24 responses; 80 s so far",
        "parity: left done, right done, reference done; 80 s so far",
        "parity: comparing every token of 24 responses",
    ]


def test_the_time_to_go_is_told_from_measured_responses():
    """Of which eight come at once: the speed is that of those after the first eight."""
    stream, clock = io.StringIO(), [0.0]
    progress = Progress(stream, watched=True, clock=lambda: clock[0])
    progress.planned(Answers("r.yaml", SIDES, 40, 128, "fp64", draws=0, at_once=False))
    progress.started("left", 1)
    for at, count in ((100.0, 8), (110.0, 16)):
        clock[0] = at
        progress.said("left", f"{count} of 40 responses")
    assert stream.getvalue().endswith(
        "left 16/40 responses; 1 min 50 s so far, about 30 s to go for this part"
    )


def test_a_closer_look_is_announced():
    again = Answers("r.yaml", SIDES[1:], 8, 128, "fp32", draws=8, at_once=True, option=ONE_AT_A_TIME)
    assert again.announcement() == [
        "parity: they differ; looks closer: right again, one prompt at a time (--batch 1)"
    ]


def test_records_are_counted_for_the_announcement_alone(tmp_path: Path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "Why?"}\n\nnot JSON\n')
    assert count_records(file) == 2  # a side says what is wrong with the second
    assert count_records(tmp_path / "p.csv") == 0


def test_mistakes_of_a_user_are_one_line(tmp_path: Path):
    tiny = write_tiny(tmp_path / "tiny")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(tiny.recipe("plain").to_yaml())
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    mistakes = {
        "has no checkpoint": ["--from", str(tmp_path)],
        "no such file": ["--file", str(tmp_path / "none.jsonl")],
        "holds a training run": ["--out", str(tmp_path / "run")],
        "leave @ out": ["--left", "jax@gpu"],
        "give 0 or more": ["--temperature", "-1"],
        "the first word is the backend": ["--right", "tensorflow"],
        "no effect at temperature 0": ["--top-p", "0.9"],
    }
    out = ["--out", str(tmp_path / "out")]
    cases = [["generate", str(recipe), *out, *words] for words in mistakes.values()]
    for said, result in zip(mistakes, run_many("parity", cases, tmp_path / "many"), strict=True):
        assert result["code"] == 2, result
        assert said in result["err"]
        assert len(result["err"].splitlines()) == 1


@pytest.mark.full(minutes=8)
def test_both_backends_answer_alike_and_a_difference_of_one_setting_is_found(tmp_path: Path):
    tiny = write_tiny(tmp_path / "tiny")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        tiny.recipe("plain", method=tiny.method("lora"), precision={"policy": "fp32"}).to_yaml()
    )
    common = ["generate", str(recipe), "--max-tokens", "16"]
    drawn = ["--temperature", "1", "--top-p", "0.9", "--seed", "2"]
    cases = {
        "fp64": ["--precision", "fp64"],
        "fp32": ["--precision", "fp32", *drawn],
        "bf16": ["--precision", "bf16", *drawn],
        "no adapter": ["--precision", "fp32", "--right", "torch method.adapter=null"],
    }
    outs = {name: tmp_path / name.replace(" ", "-") for name in cases}
    argvs = [[*common, *words, "--out", str(outs[name])] for name, words in cases.items()]
    for name, result in zip(cases, run_many("parity", argvs, tmp_path / "many"), strict=True):
        said = json.loads((outs[name] / "generate.json").read_text())
        failed = name == "no adapter"
        assert (result["code"], said["verdict"]) == ((1, "fail") if failed else (0, "pass")), result
        assert (outs[name] / "report.txt").is_file()
        # What the sides and the reference print is what progress is read from.
        for told in ("left done", "right done", "reference done", "comparing every token of 8 responses"):
            assert told in result["err"]
        if failed:
            first = said["first_difference"]
            assert (first["position"], first["sides"]) == (0, ["right"])
            assert [look["agrees"] for look in said["closer_looks"]] == [False, False]
            assert "a first token differs" in result["out"]
        else:
            assert said["tokens_compared"] > 8
            assert 0 < said["worst_log_probability"]["bound_used"] < (1e-3 if name == "fp64" else 0.8)
