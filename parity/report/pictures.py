"""The error at a first divergence as pictures: by row of the batch, position, head, feature, and as a map of two of them.

Each is inline SVG, drawn from the two arrays alone. A bar is the largest error of what it stands for, as a share of the
tensor's largest entry, on a logarithmic axis; the dashed line is the bound.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from parity.comparison.compare import Finding
from parity.comparison.pair import Pair
from parity.comparison.phases import WEIGHT_SHAPED
from parity.report.chart import BOTTOM, HEIGHT, HUGE, LEFT, RIGHT, TOP, WIDTH, svg
from parity.report.verdict import number
from trainspec.trace import Trace

Array = NDArray[Any]
Heads = Mapping[str, tuple[int, int]]
# More entries of a dimension than these are drawn several to a bar, or to a cell of a map.
BARS, MAP_ROWS, MAP_COLUMNS = 64, 48, 96
# The upper edges of a map's shades, in shares of the largest error; the colour of numbers that are not finite.
SHADES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
NOT_FINITE = 11
# Decades below the largest error that are drawn at most: from 1, those down to the bound of fp64, and some.
DECADES = 12
ROW, POSITION, VIRTUAL, HEAD = "row of the batch", "position", "virtual token", "head"
OUT, IN = "output feature", "input feature"
# Points whose second dimension is not the tokens'.
OF_VIRTUAL_TOKENS = ("prompt", "prefix_key", "prefix_value")
OF_VOCABULARY = "logits"


@dataclass(frozen=True)
class Picture:
    """A drawing and what it shows."""

    title: str
    svg: Markup


def pictures(
    first: Finding, traces: tuple[Trace, Trace] | None, *, heads: Heads | None = None
) -> list[Picture]:
    """The pictures of a first divergence; none of a scalar, or where the two arrays cannot be subtracted.

    `heads` says of weights that have heads along which dimension, and how many.
    """
    errors = _errors(first, traces) if traces else None
    if errors is None or not errors.size or errors.ndim == 0 or not errors.any():
        return []
    bound = first.bound or 0.0
    drawn = [
        Picture(f"By {name}", bars(each, name, bound))
        for name, each in _by_name(first, errors, heads or {})
        if len(each) > 1
    ]
    if errors.ndim > 1:
        names, grid = _map_of(first, errors)
        drawn.append(Picture(f"By {names[0]} (down) and {names[1]} (across)", heat(grid, names, bound)))
    return drawn


def bars(errors: Array, name: str, bound: float) -> Markup:
    """The largest errors along one dimension; several entries share a bar where they are many."""
    shown, width = _binned(errors, BARS)
    finite = shown[(shown < HUGE) & (shown > 0)]
    top = max([*finite.tolist(), bound]) or 1.0
    low, high = _decades(finite, bound, top)
    step = (WIDTH - LEFT - RIGHT) / len(shown)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    marks = []
    for decade in range(low, high + 1, max(1, (high - low) // 5)):
        at = y(10.0**decade)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        marks.append(
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{decade:d}</text>'
        )
    for i, value in enumerate(shown):
        if value == 0:
            continue
        at = y(float(value)) if value < HUGE else float(TOP)
        kind = "bar" if value <= bound else "bar over"
        said = f"{name} {_span(i, width, len(errors))}: {_said(float(value))}"
        marks.append(
            f'<rect class="{kind}" x="{LEFT + i * step + 0.1 * step:.2f}" width="{0.8 * step:.2f}" y="{at:.1f}"'
            f' height="{max(1.0, HEIGHT - BOTTOM - at):.1f}"><title>{escape(said)}</title></rect>'
        )
    every = max(1, math.ceil(len(shown) / 10))
    marks += [
        f'<text class="tick" x="{LEFT + (i + 0.5) * step:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{i * width}</text>'
        for i in range(0, len(shown), every)
    ]
    if bound >= 10.0**low:
        marks.append(
            f'<line class="curve bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(bound):.1f}" y2="{y(bound):.1f}"/>'
        )
    several = f", {width} to a bar" if width > 1 else ""
    return svg(f"Largest error by {name}{several}", marks)


def heat(errors: Array, names: tuple[str, str], bound: float) -> Markup:
    """A map [down, across]: empty within the bound, and beyond it the darker, the nearer to the largest error."""
    down, deep = _binned(errors, MAP_ROWS)
    across, wide = _binned(down.T, MAP_COLUMNS)
    cells = across.T
    step_y, step_x = (HEIGHT - TOP - BOTTOM) / len(cells), (WIDTH - LEFT - RIGHT) / len(cells[0])
    worst = float(cells[cells < HUGE].max(initial=0.0)) or 1.0
    marks = []
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            said = (
                f"{names[0]} {_span(i, deep, len(errors))}, {names[1]} {_span(j, wide, errors.shape[1])}:"
                f" {_said(float(value))}"
            )
            title = f"<title>{escape(said)}</title>" if value else ""
            marks.append(
                f'<rect class="f{_shade(float(value), bound, worst)}" x="{LEFT + j * step_x:.2f}"'
                f' y="{TOP + i * step_y:.2f}" width="{step_x:.2f}" height="{step_y:.2f}">{title}</rect>'
            )
    for i in range(0, len(cells), max(1, math.ceil(len(cells) / 8))):
        at = TOP + (i + 0.5) * step_y + 4
        marks.append(f'<text class="tick" x="{LEFT - 8}" y="{at:.1f}" text-anchor="end">{i * deep}</text>')
    for j in range(0, len(cells[0]), max(1, math.ceil(len(cells[0]) / 10))):
        at = LEFT + (j + 0.5) * step_x
        marks.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{j * wide}</text>'
        )
    return svg(f"Largest error by {names[0]} and {names[1]}", marks)


def _shade(error: float, bound: float, worst: float) -> int:
    """The number of a cell's colour class, those of the heat maps: 0 within the bound, 11 for what is not finite."""
    if error <= bound:
        return 0
    return NOT_FINITE if error >= HUGE else 1 + bisect_left(SHADES, error / worst)


def _errors(first: Finding, traces: tuple[Trace, Trace]) -> Array | None:
    """|left - right| as a share of the largest entry, NaN and infinity as infinity; None if there is no such difference."""
    pair, location = Pair(*traces), first.location
    if location.step not in (0, *pair.step_numbers, pair.stopped_step):
        return None  # a side did not make the step
    if location.phase == "resume" or location.group not in {
        key.partition("/")[0] for keys in pair.keys(location.step) for key in keys
    }:
        return None
    left, right = pair.read(location.step, location.group, location.tensor)
    if left is None or right is None or left.shape != right.shape:
        return None
    one, other = left.astype(np.float64), right.astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors = np.abs(one - other)
    sizes = np.abs(np.concatenate([one.ravel(), other.ravel()]))
    scale = float(sizes[np.isfinite(sizes)].max(initial=0.0)) or 1.0
    return np.where(np.isfinite(errors), errors / scale, np.inf)


def _dimensions(first: Finding, ndim: int) -> list[str]:
    """What each dimension of the tensor is."""
    phase, tensor = first.location.phase, first.location.tensor
    point = tensor.rpartition(".")[2]
    if phase in ("activation", "activation_gradient"):
        inner = {
            3: ["vocabulary entry" if point == OF_VOCABULARY else "feature"],
            4: [HEAD, "feature of a head"],
        }
        names = [ROW, VIRTUAL if point in OF_VIRTUAL_TOKENS else POSITION, *inner.get(ndim, [])]
    elif phase == "batch":
        names = [ROW, POSITION]
    elif phase in WEIGHT_SHAPED or phase.startswith("initial"):
        names = [OUT, IN] if ndim == 2 else ["feature"]
    else:
        names = []
    return [*names, *(f"dimension {i}" for i in range(len(names), ndim))][:ndim]


def _by_name(first: Finding, errors: Array, heads: Heads) -> list[tuple[str, Array]]:
    """(what it is, the largest error of each entry) of every dimension, and of the heads of a weight."""
    named = [
        (name, errors.max(axis=tuple(j for j in range(errors.ndim) if j != i)))
        for i, name in enumerate(_dimensions(first, errors.ndim))
    ]
    dim, count = heads.get(first.location.tensor, (0, 0))
    if count and errors.shape[dim] % count == 0:
        named.insert(0, (HEAD, named[dim][1].reshape(count, -1).max(axis=1)))
    return named


def _map_of(first: Finding, errors: Array) -> tuple[tuple[str, str], Array]:
    """The names and the errors [down, across] of the first two dimensions."""
    down, across = _dimensions(first, errors.ndim)[:2]
    return (down, across), errors.max(axis=tuple(range(2, errors.ndim)))


def _binned(errors: Array, most: int) -> tuple[Array, int]:
    """The largest errors of at most `most` groups of neighbours along the first dimension, and how many share a group."""
    width = math.ceil(len(errors) / most)
    return np.stack([errors[at : at + width].max(axis=0) for at in range(0, len(errors), width)]), width


def _decades(finite: Array, bound: float, top: float) -> tuple[int, int]:
    """The powers of ten at the bottom and the top of the axis."""
    high = math.ceil(math.log10(top))
    shown = [*finite.tolist(), *([bound] if bound > 0 else [])]
    lowest = math.floor(math.log10(min(shown))) if shown else high - 1
    return min(high - 1, max(lowest, high - DECADES)), high


def _span(i: int, width: int, length: int) -> str:
    return f"{i}" if width == 1 else f"{i * width} to {min((i + 1) * width, length) - 1}"


def _said(error: float) -> str:
    return number(error) if error < HUGE else "not finite"
