"""`parity faults`: plant each fault in one backend, compare with another's clean run, check the first divergence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from parity.comparison.compare import compare
from parity.comparison.estimated_bounds import EstimatedBounds
from parity.comparison.pair import Pair
from parity.comparison.tolerance import Bounds, ProofBounds
from parity.diagnosis import counts_of, diagnose
from parity.faults import FAULTS, SHARED
from parity.faults.fault import (
    RESUMED,
    RESUMED_AFTER,
    UNRECORDED,
    Fault,
    in_every_backend,
    setup_recipe,
)
from parity.faults.outcome import Outcome
from parity.judging.many import Series
from parity.judging.measure import Low, Replay, ReplaySettings, measured_bounds, num_summands
from parity.runs.fixture import LORA, write_tiny
from parity.runs.join import join
from parity.runs.launch_many import Case, run_cases, training
from parity.runs.programs import Launcher
from parity.runs.work import REFERENCE
from trainspec import backends
from trainspec.checkpoints.folders import checkpoint_name
from trainspec.cores import cores
from trainspec.errors import UserError, nearest
from trainspec.plans.plan import Backend, Policy
from trainspec.recipe import Recipe
from trainspec.trace import Trace

# Of two compared backends, the first one here is on the left.
BACKENDS: tuple[Backend, ...] = tuple(backends.BACKENDS)
# Nearly all of the time goes into compiling JAX's programs, each in one thread.
AT_ONCE = 2
# Where estimated bounds hide most mistakes, and raise an alarm after a fresh adapter's first update: there bounds are measured, as
# those of `parity check` are.
MEASURED: tuple[Low, ...] = ("bf16",)
# The error of each failed run, by backend and fault.
Crashes = dict[tuple[Backend, str], str]


def chosen(names: Sequence[str]) -> tuple[Fault, ...]:
    """The faults with these names, or all if there are none. Raises UserError with the nearest known name."""
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            if name in {fault.name for fault in SHARED}:
                raise UserError(
                    f"--only {name}: parity cannot see it, as both backends share it; see docs/data.md"
                )
            raise UserError(f"--only {name}: no such fault{nearest(name, known)}")
    return tuple(known[name] for name in dict.fromkeys(names)) or FAULTS


def run_faults(
    faults: Sequence[Fault],
    backends: Sequence[Backend],
    out: Path,
    *,
    precision: Policy = "fp64",
    keep: bool = False,
) -> list[Outcome]:
    """Train everything under `out` and judge it: first the clean pairs, which must pass, then every fault.

    fp64 is the proof; fp32, by the estimated bounds of `parity diff`, and bf16, by measured ones, show which faults exceed
    rounding, and which location is named then. Traces of faults that came out as expected are removed unless `keep`.
    """
    tiny = write_tiny(out / "tiny")
    setups = dict.fromkeys(fault.setup for fault in faults)
    recipes = {b: {s: setup_recipe(tiny, s, precision, b) for s in setups} for b in BACKENDS}
    clean = [clean_pair(setup) for setup in setups]
    planted: dict[Backend, list[Fault]] = {
        b: [f for f in faults if b in backends and f.applies(b, precision)] for b in BACKENDS
    }
    with ThreadPoolExecutor() as pool:
        trained = pool.map(lambda b: _train(b, [*clean, *planted[b]], recipes[b], out), BACKENDS)
        crashes: Crashes = {case: why for failed in trained for case, why in failed.items()}
    # Of a resume each backend has a clean one, held to the other's run that was not stopped.
    pairs: list[tuple[Fault, Backend]] = [
        (f, b) for f in clean for b in (BACKENDS if f.setup in RESUMED else BACKENDS[1:])
    ]
    cases = [*pairs, *((fault, b) for fault in faults for b in BACKENDS if fault in planted[b])]
    replays = _measured(cases, crashes, out, precision) if precision in MEASURED else {}
    with ProcessPoolExecutor(min(AT_ONCE, cores())) as pool:
        judged = (
            pool.submit(
                _judge,
                f,
                b,
                [recipes[side][f.setup] for side in BACKENDS],
                crashes,
                out,
                replays.get((b, f.name)),
            )
            for f, b in cases
        )
        outcomes = [each.result() for each in list(judged)]
    for outcome in outcomes[len(pairs) :]:
        if outcome.as_expected and not keep:
            shutil.rmtree(home_of(out, outcome.backend, outcome.fault))
    return outcomes


def clean_pair(setup: str) -> Fault:
    """A set-up without a fault: both backends are compared with it."""
    return Fault(
        name=f"no fault, {setup}",
        imitates="",
        source="",
        cause=None,
        where=None,
        edits=in_every_backend(),
        setup=setup,
    )


def home_of(out: Path, backend: Backend, fault: Fault) -> Path:
    """The directory of a fault's run and trace, under `out`."""
    return out / backend / fault.name.replace(", ", "-").replace(" ", "-")


def whole_trace(out: Path, backend: Backend, setup: str) -> Path:
    """The trace of a set-up's clean run, not stopped where others resume."""
    return home_of(out, backend, clean_pair(setup)) / ("whole" if setup in RESUMED else "trace")


def _train(backend: Backend, faults: Sequence[Fault], recipes: Mapping[str, Recipe], out: Path) -> Crashes:
    """Train with each of `faults`; returns the errors of those that failed.

    A set-up that resumes is first trained as a whole; every run of it then resumes from a checkpoint of that one.
    """
    for setup, recipe in recipes.items():
        (out / f"{setup}-{backend}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    first = [fault for fault in faults if fault.setup not in RESUMED or not fault.source]
    second = [fault for fault in faults if fault.setup in RESUMED]
    cases = [_case(backend, fault, recipes[fault.setup], out) for fault in first]
    at_once = min(AT_ONCE, cores())
    results = [*zip(first, run_cases(backend, cases, home=out / "launches", at_once=at_once), strict=True)]
    stopped = {fault.setup for fault, result in results if result.wrong and fault.setup in RESUMED}
    second = [fault for fault in second if fault.setup not in stopped]
    cases = [_resumed_case(backend, fault, recipes[fault.setup], out) for fault in second]
    if cases:
        home = out / "launches/resumed"
        results += zip(second, run_cases(backend, cases, home=home, at_once=at_once), strict=True)
    crashes: Crashes = {
        (backend, fault.name): result.wrong for fault, result in results if result.wrong is not None
    }
    crashes |= {
        (backend, fault.name): "the clean run that it resumes failed"
        for fault in faults
        if fault.setup in stopped and fault.source
    }
    for fault in second:
        home = home_of(out, backend, fault)
        if (backend, fault.name) not in crashes:
            join(Trace(whole_trace(out, backend, fault.setup)), Trace(home / "after"), home / "trace")
    return crashes


def _case(backend: Backend, fault: Fault, recipe: Recipe, out: Path) -> Case:
    home, file = home_of(out, backend, fault), out / f"{fault.setup}-{backend}.yaml"
    trace = "whole" if fault.setup in RESUMED else "trace"
    edits = fault.edits[backend]
    return training(
        file,
        home,
        devices=recipe.plan.devices,
        edits=edits,
        activations=fault.setup not in UNRECORDED,
        trace=trace,
    )


def _resumed_case(backend: Backend, fault: Fault, recipe: Recipe, out: Path) -> Case:
    """The second part of a run, from the checkpoint that the clean one left."""
    home, clean = home_of(out, backend, fault), home_of(out, backend, clean_pair(fault.setup))
    file, run = out / f"{fault.setup}-{backend}.yaml", "run" if fault.source else "resumed"
    if fault.source:
        shutil.rmtree(home, ignore_errors=True)
    for step in range(1, RESUMED_AFTER + 1):
        name = f"checkpoints/{checkpoint_name(step)}"
        shutil.copytree(clean / "run" / name, home / run / name, dirs_exist_ok=True)
    argv = ["train", str(file), "--out", str(home / run), "--trace", str(home / "after"), "--resume"]
    return Case((*argv, "--activations", "all"), recipe.plan.devices, fault.edits[backend])


def _sides(fault: Fault, backend: Backend, out: Path) -> list[tuple[Backend, Fault, Path]]:
    """The planted backend and the first other one, which is clean, in the order of BACKENDS, with the directories of their traces."""
    other = next(b for b in BACKENDS if b != backend)
    clean = clean_pair(fault.setup)
    return [
        (b, fault, home_of(out, b, fault) / "trace")
        if b == backend
        else (b, clean, whole_trace(out, b, fault.setup))
        for b in BACKENDS
        if b in (backend, other)
    ]


def _why(fault: Fault, backend: Backend, crashes: Crashes, out: Path) -> str | None:
    """Why there is nothing to compare; None if both sides have a trace."""
    return next(
        (why for b, side, _ in _sides(fault, backend, out) if (why := crashes.get((b, side.name)))), None
    )


def _measured(
    cases: Sequence[tuple[Fault, Backend]], crashes: Crashes, out: Path, precision: Low
) -> dict[tuple[Backend, str], Replay]:
    """Every case's float64 reference and roundings, those of a set-up by the programs of the first."""
    found: dict[tuple[Backend, str], Replay] = {}
    by_setup: list[list[Replay]] = []
    for _, some in groupby(sorted(cases, key=lambda case: case[0].setup), key=lambda case: case[0].setup):
        by_setup.append([])
        for fault, backend in some:
            if _why(fault, backend, crashes, out) is None:
                runs = [trace for *_, trace in _sides(fault, backend, out)]
                replay = Replay(runs, _settings(fault, backend, out, precision))
                found[backend, fault.name] = replay
                by_setup[-1].append(replay)
    shares: list[list[list[Replay]]] = [[] for _ in range(min(AT_ONCE, cores()))]
    for group in sorted(by_setup, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(group)
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda n: _replayed(shares[n], out / f"launches/reference-{n}"), range(len(shares))))
    return found


def _replayed(groups: Sequence[Sequence[Replay]], home: Path) -> None:
    runs = [[([str(replay.job_file)], replay.log) for replay in group] for group in groups]
    ended = Series(home, Launcher()).run(REFERENCE, runs)
    for replay, (code, last) in zip(chain(*groups), ended, strict=True):
        replay.ended(code, last)


def _settings(fault: Fault, backend: Backend, out: Path, precision: Low) -> ReplaySettings:
    """What is repeated: with activations, where the runs have them."""
    recorded: Literal["all"] | None = None if fault.setup in UNRECORDED else "all"
    recipe = out / f"{fault.setup}-{BACKENDS[0]}.yaml"
    return ReplaySettings(recipe, (), precision, home_of(out, backend, fault), recorded)


def _judge(
    fault: Fault,
    backend: Backend,
    recipes: Sequence[Recipe],
    crashes: Crashes,
    out: Path,
    replay: Replay | None = None,
) -> Outcome:
    """Compare the planted backend with the clean run of the first other one, and diagnose what differs."""
    precision = recipes[0].precision.policy
    if why := _why(fault, backend, crashes, out):
        return Outcome(fault, backend, precision, None, crash=why)
    left, right = (Trace(trace) for *_, trace in _sides(fault, backend, out))
    pair = Pair(left, right)
    try:
        bounds = _bounds(pair, recipes, replay)
    except UserError as error:
        return Outcome(fault, backend, precision, None, crash=str(error))
    comparison = compare(pair, bounds)
    diagnosis = diagnose(comparison, (left, right), counts=counts_of(recipes[BACKENDS.index(backend)]))
    if replay is not None:
        replay.remove()
    return Outcome(fault, backend, precision, comparison.first_divergence, diagnosis=diagnosis)


def _bounds(pair: Pair, recipes: Sequence[Recipe], replay: Replay | None) -> Bounds:
    """Those of the precision, measured where there is a replay. Raises UserError where the reference failed."""
    precision = recipes[0].precision.policy
    if precision == "fp64":
        return ProofBounds(pair)
    if replay is None:
        return EstimatedBounds(pair, precision, lora_scale=LORA.scale)
    summands = num_summands(recipes[0], recipes[1])
    return measured_bounds(pair, replay.settings, summands=summands, replay=replay)
