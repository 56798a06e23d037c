"""`assert_parity`: the check as one line of a test suite."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from parity.check import check
from parity.report.verdict import Verdict, explained, values_at
from parity.runs.sides import parse_side
from trainspec.errors import UserError, nearest
from trainspec.plans.names import DEVICES, Device, Policy
from trainspec.recipe import Recipe


def assert_parity(
    recipe: Path | str | Recipe,
    *,
    left: str = "jax",
    right: str = "torch",
    precision: Policy = "fp64",
    steps: int = 5,
    overrides: Sequence[str] = (),
    device: Device = "cpu",
    out: Path | str | None = None,
) -> None:
    """Train `recipe` on both sides and raise AssertionError, with the first divergence, if they differ.

    A side is a backend and its own overrides, such as "torch optimizer.eps=1e-6"; `overrides` such as "run.seed=3"
    apply to both. `device` is cpu, gpu, tpu or auto. Each side runs as a separate program: the caller's process loads neither framework. `out` keeps
    verdict.json, report.html and both traces. Raises UserError for a mistake in the recipe or its files, MachineError
    if a side's machine failed.
    """
    __tracebackhide__ = True
    if precision not in get_args(Policy):
        raise UserError(f"precision {precision!r}{nearest(precision, get_args(Policy))}")
    if device not in DEVICES:
        raise UserError(f"device {device!r}{nearest(device, DEVICES)}")
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        home = Path(out) if out else Path(scratch) / "check"
        verdict = check(
            _recipe_file(recipe, Path(scratch)), left=parse_side(left), right=parse_side(right), precision=precision,
            steps=steps, overrides=overrides, device=device, out=home,
        )  # fmt: skip
    if not verdict.holds:
        raise AssertionError(message(verdict, report=Path(out) / "report.html" if out else None))


def message(verdict: Verdict, *, report: Path | None) -> str:
    """The AssertionError's message for a failing verdict."""
    first = verdict.comparison.first_divergence
    assert first is not None
    lines = [f"{verdict.left} and {verdict.right} did not do the same training in {verdict.precision}"]
    lines += [f"first divergence: {first.location}: {explained(first)}"]
    element = f"element {list(first.index)} in " if first.index else ""
    lines += [f"  {element}{side}: {value}" for side, value in values_at(verdict, first)]
    lines += verdict.diagnosis.lines() if verdict.diagnosis else []
    lines += [f"report: {report}" if report else "pass out=DIR to keep the traces and a report"]
    return "\n".join(lines)


def _recipe_file(recipe: Path | str | Recipe, scratch: Path) -> Path:
    if not isinstance(recipe, Recipe):
        return Path(recipe)
    path = scratch / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path
