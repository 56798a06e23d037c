"""The report's two charts as SVG: loss curves, and the loss difference against its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 34
HUGE = 1e300  # beyond it (and for NaN) there is nothing to draw


@dataclass(frozen=True)
class Axes:
    """Maps steps and values to pixels; `log` makes the value axis logarithmic."""

    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool = False

    def x(self, step: float) -> float:
        """Pixels from the left edge."""
        low, high = self.steps
        return LEFT + (step - low) / max(high - low, 1e-300) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top edge."""
        low, high = (math.log10(v) for v in self.values) if self.log else self.values
        at = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (at - low) / max(high - low, 1e-300) * (HEIGHT - TOP - BOTTOM)


def loss_curves(left: Sequence[float], right: Sequence[float]) -> Markup:
    """Both curves over the steps; the right one is dashed, so that both are visible where they coincide."""
    values = [value for value in (*left, *right) if abs(value) < HUGE]
    if not values:
        return svg("No step to draw", [])
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    axes = Axes((1, max(len(left), len(right), 2)), (low - margin, high + margin))
    ticks = _round_ticks(*axes.values)
    marks = _frame(axes, [(tick, f"{tick:.4g}") for tick in ticks])
    marks += [_line(axes, list(enumerate(left, 1)), "left"), _line(axes, list(enumerate(right, 1)), "right")]
    return svg("Loss of both sides over the steps", marks)


def loss_difference(points: Sequence[tuple[int, float, float]]) -> Markup:
    """(step, error, bound) on a logarithmic axis: the further the dots are below the line, the less of the bound is used.

    Steps where both sides agree to the last bit have no logarithm; they are hollow dots at the bottom.
    """
    shown = [value for _, *pair in points for value in pair if value > 0]
    if not shown:
        return svg("No difference at any step", [])
    low, high = (
        10.0 ** math.floor(math.log10(min(shown)) - 0.3),
        10.0 ** math.ceil(math.log10(max(shown)) + 0.3),
    )
    axes = Axes((1, max(points[-1][0], 2)), (low, high), log=True)
    first, last = round(math.log10(low)), round(math.log10(high))
    ticks = range(first, last + 1, max(1, (last - first) // 5))
    marks = _frame(axes, [(10.0**tick, f"1e{tick:d}") for tick in ticks])
    marks.append(_line(axes, [(step, bound) for step, _, bound in points if bound > 0], "bound"))
    for step, error, _ in points:
        kind, height = ("dot", axes.y(error)) if error > 0 else ("dot hollow", axes.y(low))
        marks.append(f'<circle class="{kind}" cx="{axes.x(step):.1f}" cy="{height:.1f}" r="3.5"/>')
    return svg("Relative difference of the losses against its bound", marks)


def _frame(axes: Axes, ticks: Sequence[tuple[float, str]]) -> list[str]:
    marks = []
    for value, label in ticks:
        y = axes.y(value)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    first, last = (round(step) for step in axes.steps)
    for step in range(first, last + 1, max(1, math.ceil((last - first) / 10))):
        marks.append(
            f'<text class="tick" x="{axes.x(step):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{step}</text>'
        )
    marks.append(f'<text class="tick" x="{LEFT - 8}" y="{HEIGHT - 14}" text-anchor="end">step</text>')
    return marks


def _line(axes: Axes, points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points if abs(y) < HUGE)
    return f'<polyline class="curve {kind}" points="{path}"/>'


def _round_ticks(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten between `low` and `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg(title: str, marks: Sequence[str]) -> Markup:
    """A drawing of `marks`, with its title for who cannot see it; the title alone if there are none."""
    body = (
        "".join(marks)
        or f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">{escape(title)}</text>'
    )
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>')
