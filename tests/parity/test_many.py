"""Many checks in one process of each program: each trains, repeats and judges what a check of its own does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity.check import check
from parity.judging.many import CheckRequest, Series, make_runs
from parity.runs.fixture import TinySetup, write_tiny
from parity.runs.programs import Launcher
from parity.runs.series import SharedPrograms
from parity.runs.sides import NAMES, Side
from trainspec.errors import EXIT_CRASHED, UserError
from trainspec.trace import Trace

SIDES = (Side("jax"), Side("torch"))
STEPS = 2


def same_trace(one: Path, other: Path) -> bool:
    """Whether every array of every step has the same bytes."""
    traces = (Trace(one), Trace(other))
    names = [traces[0].names(step) for step in range(1, STEPS + 1)]
    assert names == [traces[1].names(step) for step in range(1, STEPS + 1)]
    return all(
        traces[0].read(step, name).tobytes() == traces[1].read(step, name).tobytes()
        for step, wanted in enumerate(names, 1)
        for name in wanted
    )


@pytest.mark.full
def test_each_is_what_a_check_of_its_own_is(tmp_path: Path):
    tiny: TinySetup = write_tiny(tmp_path / "tiny")
    recipe = tmp_path / "r.yaml"
    data = {"packing": True, "sequence_tokens": 64}
    recipe.write_text(
        tiny.recipe(method=tiny.method("lora"), precision={"policy": "fp32"}, data=data).to_yaml()
    )
    asked = [
        CheckRequest(recipe, (f"data.packing={packing}",), tmp_path / f"many-{packing}")
        for packing in ("true", "false")
    ]
    made = make_runs([asked], sides=SIDES, precision="fp32", steps=STEPS, home=tmp_path / "launches")
    alone = tmp_path / "alone"
    verdict = check(
        recipe, left=SIDES[0], right=SIDES[1], precision="fp32", steps=STEPS, overrides=asked[1].overrides, out=alone
    )  # fmt: skip
    assert verdict.holds
    comparison = made[1].judged()
    assert comparison.holds
    # The second of the group used what was compiled for the first.
    for name in NAMES:
        assert same_trace(alone / name / "trace", asked[1].out / name / "trace")
        assert not same_trace(alone / name / "trace", asked[0].out / name / "trace")
    assert [f.used for f in comparison.findings] == [f.used for f in verdict.comparison.findings]


def test_a_backend_s_states_share_the_programs_of_the_first():
    given: list[Any] = []

    def init_state(run: Any, *, like: Any = None) -> str:
        given.append(like)
        return f"state of {run}"

    backend: Any = SharedPrograms(SimpleNamespace(init_state=init_state))  # pyright: ignore[reportArgumentType]
    assert [backend.init_state(run) for run in "abc"] == ["state of a", "state of b", "state of c"]
    assert given == [None, "state of a", "state of a"]


class Dies(Launcher):
    """A program that ends after its first run."""

    def run(self, program: str, command: Sequence[str], *, log: Path, device: str = "cpu") -> tuple[int, str]:
        assert command[:3] == [sys.executable, "-m", "parity.runs.series"]
        asked = json.loads(Path(command[3]).read_text())
        assert asked == {
            "program": program,
            "groups": [[{"argv": ["a"], "log": "1"}], [{"argv": ["b"], "log": "2"}]],
        }
        Path(command[4]).write_text(json.dumps({"code": 0, "last": "done"}) + "\n")
        return -9, "out of memory"


def test_runs_that_a_program_did_not_come_to_are_crashed(tmp_path: Path):
    series = Series(tmp_path / "home", Dies())
    groups = [[(["a"], Path("1"))], [(["b"], Path("2"))]]
    assert series.run("jaxtrain", groups) == [(0, "done"), (EXIT_CRASHED, "out of memory")]


def test_a_run_that_crashed_is_one_line(tmp_path: Path):
    class CrashesAtOnce(Launcher):
        def run(
            self, program: str, command: Sequence[str], *, log: Path, device: str = "cpu"
        ) -> tuple[int, str]:
            return 1, f"{program} cannot be loaded"

    asked = CheckRequest(tmp_path / "r.yaml", (), tmp_path / "out")
    with pytest.raises(UserError, match=r"left .jax.: crashed with exit code 70: jaxtrain cannot be loaded"):
        make_runs(
            [[asked]],
            sides=SIDES,
            precision="fp64",
            steps=1,
            home=tmp_path / "home",
            launcher=CrashesAtOnce(),
        )
