"""Generation: one position's logits are those of the whole row, prompts do not see each other, and a run ends as it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backend import PROGRAM, logits, main, next_logits, start_state, train
from small import QA, ROOT, SMALL
from test_model import FP64, FULL, LORA

from trainspec.generation.rows import batch_of

PREFIX = {"kind": "prefix", "virtual_tokens": 3}
PROMPT = {"kind": "prompt", "virtual_tokens": 3}
ROWS = [[1, 7, 9, 30, 4], [1, 5], [1, 300, 12, 8, 8, 8, 2, 17, 33]]


@pytest.mark.parametrize("method", [LORA, PREFIX, PROMPT], ids=["lora", "prefix", "prompt"])
def test_the_logits_of_one_position_are_those_of_the_whole_row(make_recipe, method):
    state = start_state(make_recipe(method=method, precision=FP64))
    batch, last = batch_of(ROWS, limit=128, count=4)
    assert batch.input_ids.shape == (4, 64)
    found = next_logits(state, batch, last)
    whole = logits(state, batch)
    wanted = whole[np.arange(4), last]
    assert found.shape == (4, SMALL.vocab)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert not np.allclose(found, whole[np.arange(4), last - 1])  # control
    # A row by itself, at its own length: neither padding nor neighbours matter.
    for row, mine in zip(ROWS, found, strict=False):
        alone, at = batch_of([row], limit=len(row), count=1)
        assert alone.input_ids.shape == (1, len(row))
        np.testing.assert_allclose(next_logits(state, alone, at)[0], mine, rtol=0, atol=1e-12)


def generations(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def test_prompts_of_a_file_are_answered_by_what_was_trained(make_recipe, tmp_path: Path, capsys):
    recipe, out = make_recipe(method=FULL, precision=FP64, optimizer={"lr": 0.05}), tmp_path / "run"
    file, prompts = tmp_path / "r.yaml", tmp_path / "p.jsonl"
    file.write_text(recipe.to_yaml())
    prompts.write_text('{"instruction": "What is a list?", "output": "Items."}\n{"instruction": "Why?"}\n')
    command = ["generate", str(file), "--out", str(out), "--max-tokens", "5"]
    assert main([*command, "--untrained", "--file", str(prompts)]) == 0
    before = generations(out)
    assert [g["prompt"] for g in before] == ["What is a list?", "Why?"]
    assert [g.get("reference") for g in before] == ["Items.", None]
    assert all(len(g["ids"]) <= 5 and g["finish"] in ("length", "stop") for g in before)
    assert "the starting weights" in capsys.readouterr().out
    # Alone, with the text that stops it.
    stop = before[0]["text"][1:3]
    assert main([*command, "--untrained", "--prompt", "What is a list?", "--stop", stop]) == 0
    [alone] = generations(out)
    assert alone["finish"] == "stop"
    assert stop not in alone["text"]
    assert alone["ids"] == before[0]["ids"][: len(alone["ids"])]
    assert before[0]["text"].startswith(alone["text"])
    train(recipe, out)
    capsys.readouterr()
    assert main([*command, "--file", str(prompts)]) == 0
    assert "at step 3" in capsys.readouterr().out
    assert [g["ids"] for g in generations(out)] != [g["ids"] for g in before]
    assert main([*command, "--untrained", "--file", str(prompts)]) == 0
    assert "the starting weights" in capsys.readouterr().out
    assert generations(out) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a", "--top-k", "5"], "--top-k: has no effect at temperature 0"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens 0: give 1 or more"),
        (["--prompt", "word " * 500], "prompt 1 has"),
        (["--file", "nowhere.jsonl"], "--file nowhere.jsonl: no such file"),
        (["--prompt", " "], "the prompt is empty"),
    ],
)
def test_what_cannot_be_generated_is_one_line(make_recipe, tmp_path: Path, capsys, words, said):
    file = tmp_path / "r.yaml"
    file.write_text(make_recipe().to_yaml())
    assert main(["generate", str(file), "--out", str(tmp_path / "run"), "--untrained", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith(f"{PROGRAM}: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run/generations.jsonl").exists()


EMPTY = '{"instruction": " "}'
LONG = json.dumps({"instruction": "word " * 500})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"instruction": "Why?"}', '{"instruction": '], ["line 2"]),
        (['{"instruction": "Why?"}', "[1]", *["{}"] * 6], ["line 2", "line 6", "; and 2 more"]),
        (['{"instruction": "Why?"}', EMPTY], ["line 2", "the prompt is empty"]),
        (['{"instruction": "Why?"}', LONG], ["prompt 2 of", "has positions for 512"]),
        ([], ["has no prompt", "give a record in each line"]),
    ],
    ids=["cut", "several", "empty", "long", "none"],
)
def test_a_file_that_cannot_be_answered_is_one_line(make_recipe, tmp_path: Path, capsys, lines, said):
    """Before anything is generated: the first five bad lines are named, the rest counted."""
    file, prompts = tmp_path / "r.yaml", tmp_path / "p.jsonl"
    file.write_text(make_recipe().to_yaml())
    prompts.write_text("".join(f"{line}\n" for line in lines))
    command = ["generate", str(file), "--out", str(tmp_path / "run"), "--untrained", "--file", str(prompts)]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{PROGRAM}: ")
    assert str(prompts) in err
    assert all(part in err for part in said), err
    assert err.count("\n") == 1
    assert not (tmp_path / "run/generations.jsonl").exists()


@pytest.mark.full
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_ctrl_c_is_one_line_and_keeps_what_is_done(make_recipe, tmp_path: Path, command: str):
    """As from a terminal: the process that tokenises is interrupted, too."""
    file, out = tmp_path / "r.yaml", tmp_path / "run"
    file.write_text(make_recipe(data={"heldout": str(QA)}).to_yaml())
    prompts = ["--file", str(QA)] if command == "generate" else []
    words = [command, str(file), "--out", str(out), "--untrained", *prompts, "--batch", "2"]
    # A shell's background ignores an interruption, and so would what is started from there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", PROGRAM, *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as running:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            assert running.stdout is not None
            begun = "4 of" if command == "generate" else "measuring"
            assert any(begun in line for line in running.stdout)
            os.killpg(running.pid, signal.SIGINT)
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, err
    assert err.startswith(f"{PROGRAM}: interrupted")
    assert err.count("\n") == 1
    if command == "generate":
        kept = generations(out)
        assert 4 <= len(kept) < 1200
        assert f"has the first {len(kept)} of 1200 responses" in err
