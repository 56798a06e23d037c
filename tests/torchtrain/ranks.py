"""Many runs of torchtrain in processes that are started once, and how far apart what they leave is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.runs.edit import Edit
from parity.runs.launch_many import Case, run_cases
from trainspec.recipe import Recipe
from trainspec.trace import Trace

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Command:
    """`torchtrain VERB` of a recipe, in the directory `out`, with a mistake planted or none."""

    verb: str
    recipe: Recipe
    out: Path
    more: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()


def traced(recipe: Recipe, home: Path, *edits: Edit) -> Command:
    """Training that leaves HOME/run, and HOME/trace with activations."""
    return Command(
        "train", recipe, home / "run", ("--trace", str(home / "trace"), "--activations", "1"), edits
    )


def run_all(commands: Sequence[Command], home: Path, *, processes: int) -> None:
    """Called by tests: one launch for all of them, each of which has to end well."""
    home.mkdir(parents=True, exist_ok=True)
    cases = []
    for number, command in enumerate(commands):
        file = home / f"{number}.yaml"
        file.write_text(command.recipe.to_yaml())
        argv = (command.verb, str(file), "--out", str(command.out), *command.more)
        cases.append(Case(argv, processes, command.edits))
    for command, ended in zip(commands, run_cases("torch", cases, home=home), strict=True):
        assert ended.wrong is None, f"{command.verb} {command.out}: {ended.wrong}"
        if command.verb == "eval":
            (command.out / "said.txt").write_text(ended.printed)


def run(script: Path, cases: list[Any], home: Path, *, processes: int, timeout: float = 900) -> None:
    """Run a script that takes CASES and RESULTS in that many processes; one needs no launcher."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "parity.runs.forked", str(processes), "torchtrain"]
    command += [str(script), str(home / "cases.json"), str(home / "results.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def furthest(left: Path, right: Path, group: str, *, step: int) -> float:
    """`distance` of a group of the two traces' tensors."""
    one, other = Trace(left), Trace(right)
    assert set(one.names(step)) == set(other.names(step))
    names = [name for name in one.names(step) if name.startswith(f"{group}/")]
    return distance(*({name: t.read(step, name) for name in names} for t in (one, other)))


def distance(left: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]]) -> float:
    """The largest difference of any tensor, as a share of its largest entry on the left; NaN where there is one."""
    assert left
    assert left.keys() == right.keys()
    shares = []
    for name, array in left.items():
        mine, theirs = (np.asarray(a, np.float64) for a in (array, right[name]))
        assert mine.shape == theirs.shape
        shares.append(np.abs(mine - theirs).max() / max(np.abs(mine).max(), 1e-300))
    return float(np.max(shares))  # not Python's max, which passes over a NaN


def drift(left: Path, right: Path, key: str, *, steps: int) -> float:
    """The largest difference of a number of the traces' first rows, as a share of the left one's."""
    one, other = ([row[key] for row in Trace(trace).steps[:steps]] for trace in (left, right))
    return float(np.max(np.abs(np.array(other) / np.array(one) - 1)))
