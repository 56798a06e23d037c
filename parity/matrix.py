"""`parity matrix`: models, methods, batches, plans and precisions as data; every cell is run and judged, or refused.

One launch of a backend trains many cells, so that imports and equal compilations are paid once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from parity.check import bounds_for
from parity.compare import Comparison, Finding, compare
from parity.pair import Pair
from parity.sides import CPU_ONLY, QUIET_THREADS
from parity.tiny import LORA, VARIANTS, Tiny, write_tiny
from parity.verdict import explained
from trainspec.command import EXIT_DONE
from trainspec.errors import PlanError, TraceError, UserError
from trainspec.plan import Backend, Plan, Policy, check_supported
from trainspec.recipe import Recipe
from trainspec.trace import Trace

Fields = Mapping[str, Any]

METHODS: dict[str, Fields] = {"full": {"kind": "full"}, "lora": LORA.model_dump(mode="python")}
# How rows are filled and split: sections `data` and `batch` of a recipe.
BATCHES: dict[str, tuple[Fields, Fields]] = {
    "packed-2": ({"packing": True, "sequence_tokens": 64}, {"accumulation": 2}),
    "packed-1": ({"packing": True, "sequence_tokens": 64}, {"accumulation": 1}),
    "packed-4": ({"packing": True, "sequence_tokens": 64}, {"accumulation": 4}),
    "right-2": ({"padding_side": "right"}, {"accumulation": 2}),
    "left-2": ({"padding_side": "left"}, {"accumulation": 2}),
}
PLANS: dict[str, Plan] = {
    "one-device": Plan(),
    "remat": Plan(remat="full"),
    "data-2": Plan(data=2),
    "zero1-2": Plan(fsdp=2, shards="optimizer"),
    "zero2-2": Plan(fsdp=2, shards="gradients"),
    "zero3-2": Plan(fsdp=2, shards="params"),
    "tensor-2": Plan(tensor=2),
    "pipe-2": Plan(pipe=2, microbatches=2),
}
BACKENDS: tuple[Backend, ...] = get_args(Backend)
STEPS = 5


@dataclass(frozen=True)
class Cell:
    """One recipe that both backends must train alike; every field is a key of the tables above."""

    model: str
    method: str
    batch: str
    plan: str
    precision: Policy

    def __str__(self) -> str:
        return "/".join((self.model, self.method, self.batch, self.plan, self.precision))

    def recipe(self, tiny: Tiny) -> Recipe:
        """What is trained: five updates under a warm-up, with clipping and decay."""
        data, batch = BATCHES[self.batch]
        return tiny.recipe(
            self.model,
            method=METHODS[self.method],
            data=data,
            batch=batch,
            plan=PLANS[self.plan].model_dump(),
            precision={"policy": self.precision, "reduce": self.precision},
            optimizer={"lr": 3e-3},
            schedule={"kind": "cosine", "warmup_steps": 2},
            run={"stop_after_steps": STEPS},
        )


@dataclass(frozen=True)
class Row:
    """What became of a cell. `shown` is the place nearest to its bound; where the cell fails, the first divergence."""

    cell: Cell
    verdict: Literal["pass", "fail", "unsupported"]
    shown: Finding | None = None
    undetermined: float = 0.0
    reason: str | None = None
    refused_by: tuple[Backend, ...] = ()


def cells() -> list[Cell]:
    """Every cell: all models, methods and precisions with one batch on one device, then what varies around them."""
    base, plain = "packed-2", "plain"
    proofs: tuple[Policy, ...] = ("fp64", "fp32")
    every: tuple[Policy, ...] = get_args(Policy)
    found = [Cell(m, a, base, "one-device", p) for m, a, p in itertools.product(VARIANTS, METHODS, every)]
    for name in BATCHES:
        if name != base:
            found += [Cell(plain, a, name, "one-device", p) for a, p in itertools.product(METHODS, proofs)]
    for name in PLANS:
        if name != "one-device":
            found += [Cell(plain, a, base, name, p) for a, p in itertools.product(METHODS, proofs)]
    return found


def refusals(cell: Cell) -> dict[Backend, str]:
    """What each backend that refuses the cell says."""
    found: dict[Backend, str] = {}
    for backend in BACKENDS:
        try:
            check_supported(PLANS[cell.plan], cell.precision, backend)
        except PlanError as error:
            found[backend] = str(error)
    return found


def run_matrix(chosen: Sequence[Cell], *, out: Path) -> list[Row]:
    """Train every supported cell of `chosen` on both backends and judge it; a row for each, in their order."""
    refused = {cell: refusals(cell) for cell in chosen}
    supported = [cell for cell in chosen if not refused[cell]]
    wrong = _train(supported, out) if supported else {}
    rows = []
    for cell in chosen:
        if lines := refused[cell]:
            rows.append(Row(cell, "unsupported", reason=next(iter(lines.values())), refused_by=tuple(lines)))
        elif line := wrong.get(cell):
            rows.append(Row(cell, "fail", reason=line))
        else:
            rows.append(judge(cell, *(_home(out, backend, cell) / "trace" for backend in BACKENDS)))
    return rows


def judge(cell: Cell, left: Path, right: Path) -> Row:
    """Compare the cell's two traces with the bounds of its precision."""
    try:
        pair = Pair(Trace(left), Trace(right))
        scale = LORA.scale if METHODS[cell.method]["kind"] == LORA.kind else 1.0
        return row_of(cell, compare(pair, bounds_for(pair, cell.precision, lora_scale=scale)))
    except TraceError as error:
        return Row(cell, "fail", reason=str(error))


def row_of(cell: Cell, found: Comparison) -> Row:
    """The figures of a comparison that stand for the cell."""
    if first := found.first_divergence:
        return Row(cell, "fail", first, found.undetermined, explained(first))
    return Row(cell, "pass", max(found.findings, key=lambda f: f.used), found.undetermined)


def _train(supported: Sequence[Cell], out: Path) -> dict[Cell, str]:
    """Leaves every cell's traces under `out`; for a cell that a backend did not finish, what it said.

    One launch per backend and number of devices; both backends run at the same time.
    """
    tiny = write_tiny(out / "tiny")
    wrong: dict[Cell, str] = {}
    for _, group in _by_devices(supported):
        launches = [(backend, _launch(backend, group, tiny, out)) for backend in BACKENDS]
        for backend, (child, results) in launches:
            _, said = child.communicate()
            if child.returncode:
                last = (said.strip().splitlines() or [""])[-1]
                wrong |= {
                    cell: f"{backend}train died with exit code {child.returncode}: {last}" for cell in group
                }
                continue
            for cell, result in zip(group, json.loads(results.read_text()), strict=True):
                if result["code"] != EXIT_DONE:
                    wrong[cell] = (result["err"].strip().splitlines() or [f"exit code {result['code']}"])[-1]
    return wrong


def _by_devices(supported: Sequence[Cell]) -> Iterator[tuple[int, list[Cell]]]:
    groups: dict[int, list[Cell]] = defaultdict(list)
    for cell in supported:
        groups[PLANS[cell.plan].devices].append(cell)
    yield from groups.items()


def _launch(
    backend: Backend, group: Sequence[Cell], tiny: Tiny, out: Path
) -> tuple[subprocess.Popen[str], Path]:
    """Start one process that trains every cell of `group`; the path is where its results will be."""
    cases = []
    for cell in group:
        home = _home(out, backend, cell)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "recipe.yaml").write_text(cell.recipe(tiny).to_yaml())
        argv = [
            "train",
            str(home / "recipe.yaml"),
            "--out",
            str(home / "run"),
            "--trace",
            str(home / "trace"),
        ]
        cases.append({"program": f"{backend}train", "argv": argv, "edits": []})
    file = out / f"{backend}-cases.json"
    results = out / f"{backend}-results.json"
    file.write_text(json.dumps(cases))
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "parity.plant", str(file), str(results)]
    environment = QUIET_THREADS | os.environ | CPU_ONLY
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    return child, results


def _home(out: Path, backend: Backend, cell: Cell) -> Path:
    return out / backend / str(cell).replace("/", "-")


def select(only: str | None) -> list[Cell]:
    """The cells whose name contains `only`. Raises UserError where there is none."""
    chosen = [cell for cell in cells() if only is None or only in str(cell)]
    if not chosen:
        raise UserError(f"--only {only}: no cell has that in its name; names are such as {cells()[0]}")
    return chosen
