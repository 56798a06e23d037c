"""report.html: one self-contained page that shows a verdict to a person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parity.chart import loss_curves, loss_difference
from parity.verdict import TITLES, Verdict, explained, number

# What decides numbers. Their versions are read from package metadata: nothing of them is imported here.
PACKAGES = ("twintrain", "numpy", "jax", "flax", "optax", "torch", "transformers", "peft", "deepspeed")
TABLE_ROWS = 10


@dataclass(frozen=True)
class Report:
    """A verdict with what only the page shows: loss per step of each side, and the recipe with its settings."""

    verdict: Verdict
    left_losses: Sequence[float]
    right_losses: Sequence[float]
    recipe: str | None = None
    settings: tuple[str, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Render the page to `path`."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page as text; everything that comes from a trace or a recipe is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": number, "decades": _decades}
    verdict, comparison = report.verdict, report.verdict.comparison
    losses = [f for f in comparison.findings if f.place.phase == "loss" and f.place.tensor == "loss"]
    points = [(f.place.step, f.error, f.bound) for f in losses if f.error is not None and f.bound is not None]
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict,
        first=comparison.first_divergence,
        worst=comparison.worst.values(),
        tensors=comparison.worst_tensors(TABLE_ROWS),
        titles=TITLES,
        explained=explained,
        curves=loss_curves(report.left_losses, report.right_losses),
        difference=loss_difference(points),
        places=len(comparison.findings),
        versions=_versions(),
    )


def _decades(used: float) -> float:
    """The length of a bar in per cent: 0 at 1e-8 of the bound, 100 at the bound."""
    return 0.0 if used <= 1e-8 else min(100.0, 100.0 * (1.0 + math.log10(used) / 8.0))


def _versions() -> list[tuple[str, str]]:
    """(package, version) of what is installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
