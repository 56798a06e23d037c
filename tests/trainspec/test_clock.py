"""Where the time goes: laps and spans add up, what overlaps counts once, and the first update is in no average."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainspec.runs.clock import BEGAN, FIRST, INPUT, Clock, command_start, table
from trainspec.training.report import Reporter, StepReport, Work


@pytest.fixture
def passes(monkeypatch) -> Callable[[float], None]:
    """Lets that many seconds pass on the clock that programs read."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_laps_follow_on_each_other(passes):
    clock = Clock(began=95.0)
    clock.lap("before")
    passes(2.0)
    clock.lap("after")
    assert [(lap.name, lap.seconds) for lap in clock.laps] == [("before", 5.0), ("after", 2.0)]
    assert clock.report()["to_first_update_seconds"] == 7.0


def test_what_overlaps_counts_once(passes):
    clock = Clock()
    for start, end in ((0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (7.0, 8.0)):
        clock.tell("traced", start, end)
    clock.tell("compiled", 3.0, 4.0)
    passes(9.0)
    clock.lap("first")
    clock.lap("second")
    assert clock.laps[0].of_which == {"traced": 6.0, "compiled": 1.0}
    assert clock.laps[1].of_which == {}


def test_the_first_updates_lap_says_what_its_observers_took(passes):
    clock = Clock()
    for _ in clock.awaited(range(1)):
        for name, seconds in (("update", 4.0), ("weights read", 1.0), ("evaluation", 2.0)):
            with clock.during(name):
                passes(seconds)
    [lap] = clock.laps
    assert (lap.seconds, lap.of_which) == (7.0, {"evaluation": 2.0})


def updates(clock: Clock, passes: Callable[[float], None], *seconds: tuple[float, float]) -> None:
    """An update for each pair: so long waited for its batch, so long made."""

    def batches():
        for waited, _ in seconds:
            passes(waited)
            yield None

    for (waited, made), _ in zip(seconds, clock.awaited(batches()), strict=False):
        assert clock.seconds(INPUT) == waited
        with clock.during("update"):
            passes(made)
        with clock.during("report"):
            passes(0.25)


def test_the_first_update_is_a_lap_and_in_no_average(passes):
    clock = Clock()
    passes(3.0)
    clock.lap("starting weights read")
    updates(clock, passes, (1.0, 60.0), (0.0, 2.0), (0.5, 4.0), (0.0, 3.0), (9.0, 0.0))
    report = clock.report()
    assert [(lap["what"], lap["seconds"]) for lap in report["laps"]] == [
        ("starting weights read", 3.0),
        (FIRST, 61.25),
    ]
    assert report["later_updates"] == 3  # zip has taken the last batch, and nothing was done with it
    assert report["per_update"] == {
        "input": {"total": 0.5, "median": 0.0, "largest": 0.5},
        "update": {"total": 9.0, "median": 3.0, "largest": 4.0},
        "report": {"total": 0.75, "median": 0.25, "largest": 0.25},
    }
    lines = table(report)
    assert lines[0].split() == ["to", "the", "end", "of", "the", "first", "update", "64.25", "s"]
    assert lines[-2].split() == ["update", "9.00", "s", "3000.00", "ms", "4000.00", "ms"]


def test_a_command_has_begun_before_now(monkeypatch):
    own = command_start()
    assert 0 < time.perf_counter() - own < 24 * 3600
    monkeypatch.setenv(BEGAN, repr(own - 5.0))  # by the process that launched this one
    assert command_start() == own - 5.0


def test_a_line_says_the_speed_of_all_but_the_first_update(tmp_path: Path, capsys):
    work = Work(targets=600, tokens=1000, operations=5e12, seconds=2.0, waited=0.5)
    assert (work + work).speed() == work.speed()
    with Reporter(tmp_path, backend="program", steps=2) as reporter:
        reporter.step(StepReport(1, 2.0, 600, 1.0, 1e-3, seconds=60.0))
        reporter.step(StepReport(2, 2.0, 600, 1.0, 1e-3, seconds=2.0, speed=work.speed()))
        reporter.timings(
            {"laps": [], "to_first_update_seconds": 1.0, "later_updates": 0, "counts": {"hits": 2}}
        )
    first, second, *timings = capsys.readouterr().out.splitlines()
    assert first.endswith("  600 tokens  first update 60.00 s")
    assert second.endswith("  600 tokens  300 target tokens/s  500 tokens/s  2.5 TFLOP/s  input 20.0%")
    assert timings[-1] == "  hits: 2"
    one, two = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    speed = {
        "tokens_per_second": 300.0,
        "all_tokens_per_second": 500.0,
        "model_tflops_per_second": 2.5,
        "input_share": 0.2,
    }
    assert two == one | {"step": 2, "seconds": 2.0} | speed
    assert not speed.keys() & one.keys()
    assert json.loads((tmp_path / "timings.json").read_text())["program"] == "program"
