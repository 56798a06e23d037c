"""The report's heat maps: per phase a table of tensors by steps, each cell the share of its bound that is used."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from parity.comparison.compare import Finding
from parity.comparison.phases import INITIAL_GROUPS, PHASES
from parity.report.verdict import number

# The upper edges of the colours, in shares of the bound; finer near the bound. Class u0 means no difference, and the last
# two classes are beyond the bound.
EDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 1e3)
WITHIN = EDGES.index(1.0) + 1
# The most cells and columns of one map; with more steps a column stands for several, to limit the page to a few megabytes.
CELLS, COLUMNS = 20_000, 100
# With more columns than this, cells are narrow, so that a laptop shows fifty of them beside the names.
DENSE = 30
# Phases with only a few locations per step: they share one map.
FEW = ("batch", "tokens", "loss", "grad_norm", "clip", "lr")


@dataclass(frozen=True)
class HeatMap:
    """One collapsible section of the page; `opened` if it starts open."""

    title: str
    tensors: int
    steps: int
    worst: Finding
    table: Markup
    steps_per_column: int
    opened: bool


def heat_maps(findings: Sequence[Finding]) -> list[HeatMap]:
    """One map per phase in causal order; the starting weights, which have no steps, only if one of them fails.

    The map with the first divergence is open and frames its cell.
    """
    groups: dict[str, list[Finding]] = {}
    titles = {"few": "batch and scalars"} | {phase.name: phase.title for phase in PHASES}
    for finding in findings:
        name = finding.location.phase
        groups.setdefault("few" if name in FEW else name, []).append(finding)
    first = next((finding for finding in findings if not finding.holds), None)
    shown = [name for name in titles if name in groups]
    shown = [name for name in shown if name not in INITIAL_GROUPS or any(not f.holds for f in groups[name])]
    opened = next((name for name in shown if first in groups[name]), "update")
    return [_map(titles[name], groups[name], first, opened=name == opened) for name in shown]


def level(used: float) -> int:
    """The number of a cell's colour class: 0 for no difference, then one more for every edge passed."""
    return 0 if used == 0 else 1 + bisect_left(EDGES, used)


def legend() -> list[str]:
    """What each level means, in order."""
    within = [f"to {edge:g}" for edge in EDGES[:WITHIN]]
    beyond = [f"over, to {edge:g} times the bound" for edge in EDGES[WITHIN:]]
    return ["equal", *within, *beyond, f"over {EDGES[-1]:g} times"]


def _map(title: str, findings: Sequence[Finding], first: Finding | None, *, opened: bool) -> HeatMap:
    tensors: dict[str, dict[int, Finding]] = {}
    for finding in findings:
        tensors.setdefault(finding.location.tensor, {})[finding.location.step] = finding
    steps = sorted({finding.location.step for finding in findings})
    columns = max(1, min(len(steps), COLUMNS, CELLS // len(tensors)))
    width = math.ceil(len(steps) / columns)
    groups = [steps[at : at + width] for at in range(0, len(steps), width)]
    every = math.ceil(len(groups) / 10)
    head = "".join(f"<th>{group[0] if i % every == 0 else ''}" for i, group in enumerate(groups))
    body = "\n".join(
        f'<tr><th scope=row title="{escape(name)}">{escape(name)}{_cells(by_step, groups, first)}'
        for name, by_step in tensors.items()
    )
    dense = " dense" if len(groups) > DENSE else ""
    table = Markup(f'<table class="heat{dense}"><thead><tr><th>tensor \\ step{head}<tbody>\n{body}</table>')
    worst = max(findings, key=lambda f: f.used)
    return HeatMap(title, len(tensors), len(steps), worst, table, width, opened)


def _cells(by_step: dict[int, Finding], groups: Sequence[Sequence[int]], first: Finding | None) -> str:
    cells = []
    for group in groups:
        findings = [by_step[step] for step in group if step in by_step]
        if findings:
            worst = max(findings, key=lambda f: f.used)
            frame = " id=first" if any(f is first for f in findings) else ""
            cells.append(
                f'<td class=u{level(worst.used)}{frame} title="step {worst.location.step}: {_said(worst)}">'
            )
        else:
            cells.append("<td>")
    return "".join(cells)


def _said(finding: Finding) -> str:
    if math.isfinite(finding.used):
        return number(finding.used)
    return str(escape(finding.reason or "beyond any bound"))
