"""Programs in turns, and what is made of their figures."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from small import ROOT

# Answers like a trainer: `updates` of `cost` seconds each, until it is told to end; or it fails in its second turn.
PROGRAM = """
import json, sys
cost, fails = float(sys.argv[1]), sys.argv[2:] == ["fails"]
say = lambda **words: print(json.dumps(words), flush=True)
say(seconds=1)
turns = 0
for line in sys.stdin:
    if line.strip() == "end":
        say(loss=cost, peak_bytes=1)
        break
    turns += 1
    if fails and turns == 2:
        sys.exit("out of luck")
    say(seconds=cost * int(line), core_seconds=2 * cost * int(line) + turns)
"""


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("turns")


@pytest.mark.parametrize("at_once", [True, False])
def test_every_program_has_its_turns(turns: ModuleType, tmp_path: Path, at_once: bool):
    launches = [
        turns.Launch(name, [sys.executable, "-c", PROGRAM, *arguments])
        for name, arguments in {"slow": ["4.0"], "fast": ["2.0"], "ill": ["1.0", "fails"]}.items()
    ]
    found = turns.measure(launches, rounds=3, updates=2, warm_up=1, at_once=at_once, logs=tmp_path)
    # The warm-up is a turn, and is left out.
    assert found["slow"].rounds == [(4.0, 9.0), (4.0, 9.5), (4.0, 10.0)]
    assert found["fast"].last == {"loss": 2.0, "peak_bytes": 1}
    assert found["ill"] == "ill ended with code 1: out of luck"
    wall, core = found["fast"].speed_beside(found["slow"])
    assert wall == (2.0, 2.0, 2.0)
    assert core == (9.5 / 5.5, 10 / 6, 9 / 5)


def test_a_ratio_is_that_of_a_round_not_of_the_medians(turns: ModuleType):
    ours = turns.Measured(0.0, [turns.Turn(seconds, 1.0) for seconds in (1.0, 10.0, 2.0)])
    theirs = turns.Measured(0.0, [turns.Turn(seconds, 1.0) for seconds in (3.0, 30.0, 2.0)])
    wall, _ = ours.speed_beside(theirs)
    assert wall == (3.0, 1.0, 3.0)
    assert theirs.seconds / ours.seconds == 1.5
