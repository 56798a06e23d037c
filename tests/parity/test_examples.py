"""The programs of docs/examples: each pair passes, and each planted mistake is found where docs/record-a-trace.md says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from parity.cli import main, parser

ROOT = Path(__file__).parent.parent.parent
PAIRS = {
    "mlp": ("jax", "torch"),
    "lm": ("jax", "torch"),
    "bn": ("jax", "torch"),
    "trainer": ("hf", "loop"),
}
# Of a pair the program and its flag; where the mistake first shows: the phase and the tensor that it may be in, and if it
# is not the first step, which: the two slices of the first batch of `lm` have as many targets.
MISTAKES = {
    ("mlp", "torch", "--eps-inside"): ("update", r".*"),
    ("mlp", "jax", "--divide-by-examples"): ("gradient", r"2\.(weight|bias)"),
    ("lm", "torch", "--mean-of-means"): ("gradient", r"head\.weight", 2),
    ("lm", "jax", "--decay-all"): ("update", r".*(norm|bias).*"),
    ("bn", "torch", "--eval-mode"): ("activation", r"bn"),
    ("bn", "jax", "--biased"): ("change", r"bn\.running_var"),
    ("trainer", "hf", "--after-clip"): ("gradient", r"lm_head\.weight"),
    ("trainer", "loop", "--mean-of-means"): ("gradient", r"lm_head\.weight"),
}


# Of the fast tests.
FAST = "mlp"


def marked(pair: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if pair == FAST else (pytest.mark.full,)


@pytest.fixture(scope="module")
def traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PAIR/PROGRAM and PAIR/PROGRAM--flag for all pairs and mistakes."""
    home = tmp_path_factory.mktemp("examples")
    is_fast = request.config.option.markexpr == "not full"
    runs = [(pair, program, "") for pair, programs in PAIRS.items() for program in programs]
    for pair, program, flag in (*runs, *MISTAKES):
        if is_fast and pair != FAST:
            continue
        script = str(ROOT / f"docs/examples/twin_{pair}_{program}.py")
        argv = [sys.executable, script, str(home / pair / f"{program}{flag}"), *([flag] if flag else [])]
        subprocess.run(argv, check=True, cwd=ROOT, timeout=300)
    return home


def verdict_of(left: Path, right: Path, out: Path) -> dict:
    code = main(["diff", str(left), str(right), "--out", str(out)])
    verdict = json.loads((out / "verdict.json").read_text())
    assert code == (verdict["verdict"] != "pass")
    return verdict


@pytest.mark.parametrize("pair", [pytest.param(pair, marks=marked(pair)) for pair in PAIRS])
def test_the_twins_agree(traces: Path, pair: str, tmp_path: Path):
    left, right = (traces / pair / program for program in PAIRS[pair])
    verdict = verdict_of(left, right, tmp_path)
    assert verdict["first_divergence"] is None
    assert verdict["precision"] == "fp64"
    assert 0 <= verdict["worst"]["update"]["error"] < 1e-9
    assert not any("headers differ" in note or "policy" in note for note in verdict["notes"])


@pytest.mark.parametrize("mistake", [pytest.param(m, id=" ".join(m), marks=marked(m[0])) for m in MISTAKES])
def test_a_planted_mistake_is_found_where_it_is(traces: Path, mistake: tuple[str, str, str], tmp_path: Path):
    pair, wrong, flag = mistake
    left, right = (traces / pair / f"{program}{flag if program == wrong else ''}" for program in PAIRS[pair])
    first = verdict_of(left, right, tmp_path)["first_divergence"]
    phase, tensor, *step = MISTAKES[mistake]
    assert first["phase"] == phase, first
    assert re.fullmatch(tensor, first["tensor"]), first
    assert first["step"] == (step[0] if step else 1)


def test_the_page_s_commands_exist_and_name_every_mistake():
    text = (ROOT / "docs/record-a-trace.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    run = set()
    for program, *argv in commands:
        if program == "parity":
            parser().parse_args(argv)
            continue
        script, _, *flags = argv
        pair, name = re.fullmatch(r"docs/examples/twin_(\w+)_(\w+)\.py", script).groups()
        assert (ROOT / script).is_file()
        run.add((pair, name, *flags))
    assert run == {(pair, name) for pair in PAIRS for name in PAIRS[pair]} | set(MISTAKES)
