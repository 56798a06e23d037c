"""report.html: one self-contained page that shows a verdict."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parity.comparison.compare import Finding
from parity.report.chart import loss_curves, loss_difference
from parity.report.heat import heat_maps, legend
from parity.report.pictures import pictures
from parity.report.settings import origins_of, settings_of
from parity.report.verdict import TITLES, Verdict, explained, number, values_at
from trainspec.trace import Trace
from trainspec.versions import installed_versions

# Packages that affect the numbers. Their versions come from package metadata; none of them is imported here.
PACKAGES = ("twintrain", "numpy", "jax", "flax", "optax", "torch", "transformers", "peft", "deepspeed")
TABLE_ROWS = 10
# How many findings are shown before and after the first divergence, in causal order.
BEFORE, AFTER = 3, 6


@dataclass(frozen=True)
class Report:
    """A verdict, and what only the page shows: each side's loss per step, and the recipe with its settings.

    `recipes` are those that left and right trained, as YAML with every default; empty for two traces. `traces` are those that
    the first divergence is in, `heads` along which dimension a weight has heads, and how many. `next` are commands that come next,
    each with what it is for.
    """

    verdict: Verdict
    left_losses: Sequence[float]
    right_losses: Sequence[float]
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    traces: tuple[Trace, Trace] | None = None
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    next: tuple[tuple[str, str], ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Render the page to `path`."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page as HTML; everything from a trace or a recipe is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": number, "decades": _decades}
    verdict, comparison = report.verdict, report.verdict.comparison
    first = comparison.first_divergence
    losses = [f for f in comparison.findings if f.location.phase == "loss" and f.location.tensor == "loss"]
    points = [
        (f.location.step, f.error, f.bound) for f in losses if f.error is not None and f.bound is not None
    ]
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict,
        first=first,
        values=values_at(verdict, first) if first else [],
        worst=comparison.worst.values(),
        around=_around(comparison.findings),
        tensors=comparison.worst_tensors(TABLE_ROWS),
        settings=settings_of(report.recipes, report.traces),
        origins=origins_of(report.traces) if report.recipes else [],
        pictures=pictures(first, report.traces, heads=report.heads) if first else [],
        maps=heat_maps(comparison.findings),
        legend=legend(),
        titles=TITLES,
        explained=explained,
        curves=loss_curves(report.left_losses, report.right_losses),
        difference=loss_difference(points),
        locations=len(comparison.findings),
        versions=versions(),
    )


def _around(findings: Sequence[Finding]) -> Sequence[Finding]:
    """The first divergence among its neighbours; empty if there is none."""
    at = next((i for i, finding in enumerate(findings) if not finding.holds), None)
    return [] if at is None else findings[max(0, at - BEFORE) : at + 1 + AFTER]


def _decades(used: float) -> float:
    """The length of a bar in percent: 0 at 1e-8 of the bound, 100 at the bound."""
    return 0.0 if used <= 1e-8 else min(100.0, 100.0 * (1.0 + math.log10(used) / 8.0))


def versions() -> list[tuple[str, str]]:
    """(package, version) of Python and the installed packages that affect the numbers."""
    return [("python", platform.python_version()), *installed_versions(PACKAGES).items()]
