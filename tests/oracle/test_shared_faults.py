"""Each fault of what both backends share: transformers catches it, and parity, which cannot, passes.

The clean run on the same chat (tools, a prefix, packed rows) passes too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from many import ROOT
from small import SMALL, write_checkpoint

from oracle.conversations import CONVERSATIONS
from oracle.judge import Judge, fix_clock
from oracle.templates import TAGGED, TEMPLATES
from oracle.tokenizers import make_tokenizers
from parity.faults import SHARED, SharedFault
from trainspec.date import DATE

TEMPLATE, TOKENIZER = "qwen3", "prepend"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shared")
    write_checkpoint(home / "model", replace(SMALL, vocab=1024, max_positions=2048))
    make_tokenizers(home / "tokenizers")
    (home / "t.jinja").write_text(TEMPLATES[TEMPLATE])
    return home


@pytest.fixture(scope="module")
def filled(home: Path) -> Callable[[str, str], Path]:
    """Fills the cache of a recipe of its own with a fault planted; gives the recipe."""

    @cache
    def fill(fault: str, conversation: str) -> Path:
        folder = home / f"{fault}-{conversation}"
        folder.mkdir()
        # Another chat behind it, so that a row has two documents.
        lines = [json.dumps(CONVERSATIONS[name]) for name in (conversation, "one_turn", "emoji")]
        (folder / "d.jsonl").write_text("\n".join(lines))
        recipe = {
            "model": {"from": str(home / "model"), "weights": "random"},
            "method": {"kind": "prefix", "virtual_tokens": 3},
            "data": {
                "train": str(folder / "d.jsonl"),
                "chat_template": str(home / "t.jinja"),
                "tokenizer": str(home / "tokenizers" / TOKENIZER),
                "sequence_tokens": 1000,
                "packing": True,
                "cache": str(folder / "cache"),
            },
            "batch": {"global_examples": 2},
            "run": {"steps": 2},
        }
        (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "oracle.plant", fault, str(folder / "r.yaml")]
        subprocess.run(command, check=True, cwd=ROOT / "tests")
        return folder / "r.yaml"

    return fill


def of_cache(recipe: Path) -> tuple[list[int], list[bool]]:
    """The first record's ids, and which count."""
    [folder] = [f for f in (recipe.parent / "cache").iterdir() if f.is_dir()]
    tokens, marks = np.fromfile(folder / "tokens.bin", np.int32), np.fromfile(folder / "marks.bin", np.uint8)
    first = int(np.load(folder / "offsets.npy")[1])
    return tokens[:first].tolist(), ((marks[:first] & 1) > 0).tolist()


@pytest.fixture(scope="module")
def judge(home: Path) -> Judge:
    return Judge(home / "tokenizers" / TOKENIZER)


def wanted(judge: Judge, conversation: str) -> tuple[list[int], list[bool]]:
    record = CONVERSATIONS[conversation]
    said = judge.verdict(TAGGED[TEMPLATE], record["messages"], record.get("tools"))
    # The first token of a document is never a target, and here none claims to be.
    return said.ids, said.counts


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name, marks=pytest.mark.full if i else ()) for i, f in enumerate(SHARED)],
)
def test_transformers_catches_it(fault: SharedFault, filled, judge: Judge, monkeypatch: pytest.MonkeyPatch):
    fix_clock(monkeypatch, DATE)
    ids, counts = of_cache(filled(fault.name, fault.conversation))
    expected = wanted(judge, fault.conversation)
    assert (ids, counts) != expected
    assert of_cache(filled("-", fault.conversation)) == expected


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full) for name in ("-", *(f.name for f in SHARED))],
)
def test_parity_passes_all_the_same(name: str, filled, tmp_path: Path):
    """With nothing planted too: tools, a prefix and packed rows, in float64."""
    conversation = next((f.conversation for f in SHARED if f.name == name), "tool_call")
    recipe = filled(name, conversation)
    command = [sys.executable, "-m", "parity", "check", str(recipe), "--precision", "fp64", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["verdict"] == "pass"
