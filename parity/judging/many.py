"""Many checks of recipes that share programs: each backend, and the float64 reference, is started once for all of them.

A check of a small model is nearly all imports and compilation. What is trained, repeated and judged here is what `parity check`
trains, repeats and judges, with the same command lines; only the processes are fewer (`parity.runs.series`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from parity.comparison.compare import Comparison
from parity.comparison.pair import Pair
from parity.comparison.tolerance import Bounds, ProofBounds
from parity.judging.judge import compare_sides
from parity.judging.measure import Low, Replay, ReplaySettings, measured_bounds, num_summands
from parity.runs.devices import ON_CORES, Placement
from parity.runs.programs import Launcher
from parity.runs.sides import NAMES, Side, SideResult, SideTraining
from parity.runs.work import REFERENCE
from trainspec.backends import BACKENDS
from trainspec.errors import EXIT_CRASHED
from trainspec.plans.names import DeviceKind, Policy
from trainspec.recipe import load_recipe

T = TypeVar("T")
Groups = Sequence[Sequence[T]]


@dataclass(frozen=True)
class CheckRequest:
    """One check: a recipe with overrides, and where its files go."""

    recipe: Path
    overrides: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class RunPair:
    """A check whose runs are made, and the bounds that they are to be held to."""

    results: tuple[SideResult, ...]
    bounds: Callable[[Pair], Bounds]

    def judged(self) -> Comparison:
        """Every location of both runs, compared."""
        return compare_sides(self.results, self.bounds)


@dataclass(frozen=True)
class Series:
    """Starts one program for the runs of many checks; `home` has its files."""

    home: Path
    launcher: Launcher

    def run(
        self, program: str, groups: Groups[tuple[list[str], Path]], *, device: DeviceKind = "cpu"
    ) -> list[tuple[int, str]]:
        """How each run, a command line and its log, ended: its exit code and its last line.

        Those that the program did not come to, because it died, have its last line.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        work, ended = self.home / f"{program}.json", self.home / f"{program}-ended.jsonl"
        ended.unlink(missing_ok=True)
        asked = [[{"argv": argv, "log": str(log)} for argv, log in group] for group in groups]
        work.write_text(json.dumps({"program": program, "groups": asked}) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "parity.runs.series", str(work), str(ended)]
        _, last = self.launcher.run(program, command, log=self.home / f"{program}.log", device=device)
        lines = ended.read_text(encoding="utf-8").splitlines() if ended.is_file() else []
        codes = [(record["code"], record["last"]) for record in map(json.loads, lines)]
        return codes + [(EXIT_CRASHED, last)] * (sum(map(len, groups)) - len(codes))


def make_runs(
    groups: Groups[CheckRequest],
    *,
    sides: tuple[Side, Side],
    precision: Policy,
    steps: int,
    home: Path,
    launcher: Launcher | None = None,
    placement: Placement = ON_CORES,
) -> list[RunPair]:
    """Train `steps` updates of every recipe on both sides, and in fp32 and bf16 repeat them in float64; in the order of `groups`.

    The recipes of a group differ in `model.from` and `data` alone, at equal shapes, and plans have one device. Raises
    UserError or MachineError for a run that did not end by itself.
    """
    series = Series(home, launcher or Launcher())
    by_side = [
        _trained(groups, name, side, precision, steps, series, placement.of(name))
        for name, side in zip(NAMES, sides, strict=True)
    ]
    results = list(zip(*by_side, strict=True))
    if precision == "fp64":
        return [RunPair(pair, ProofBounds) for pair in results]
    remaining, replays = iter(results), []
    for group in groups:
        replays.append([_replay(asked, next(remaining), precision) for asked in group])
    present = [[replay for replay in group if replay] for group in replays]
    runs = [[([str(replay.job_file)], replay.log) for replay in group] for group in present]
    for replay, ended in zip(
        chain(*present), series.run(REFERENCE, runs, device=placement.reference), strict=True
    ):
        replay.ended(*ended)
    return [
        RunPair(pair, partial(_bounds, precision=precision, asked=asked, sides=sides, replay=replay))
        for pair, asked, replay in zip(results, chain(*groups), chain(*replays), strict=True)
    ]


def _trained(
    groups: Groups[CheckRequest],
    name: str,
    side: Side,
    precision: Policy,
    steps: int,
    series: Series,
    device: DeviceKind,
) -> list[SideResult]:
    """One side of every check."""
    trainings = [
        [SideTraining(side, name, asked.recipe, asked.overrides, precision, asked.out) for asked in group]
        for group in groups
    ]
    for training in chain(*trainings):
        training.clear()
    runs = [[(t.arguments(steps, t.trace), t.home / "log.txt") for t in group] for group in trainings]
    ended = series.run(BACKENDS[side.backend].program, runs, device=device)
    return [
        training.result(code, last, log=log, trace=training.trace)
        for training, (_, log), (code, last) in zip(chain(*trainings), chain(*runs), ended, strict=True)
    ]


def _replay(asked: CheckRequest, results: Sequence[SideResult], precision: Low) -> Replay | None:
    """What repeats both runs in float64; None if one of them has no trace."""
    traces = [result.trace.directory for result in results if result.trace]
    if len(traces) < len(results):
        return None
    return Replay(traces, _settings(asked, precision))


def _settings(asked: CheckRequest, precision: Low) -> ReplaySettings:
    return ReplaySettings(asked.recipe, asked.overrides, precision, asked.out)


def _bounds(
    pair: Pair, *, precision: Low, asked: CheckRequest, sides: tuple[Side, Side], replay: Replay | None
) -> Bounds:
    left, right = (load_recipe(asked.recipe, (*asked.overrides, *side.overrides)) for side in sides)
    settings, summands = _settings(asked, precision), num_summands(left, right)
    return measured_bounds(pair, settings, summands=summands, replay=replay)
