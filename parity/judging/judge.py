"""What `parity check` and `parity diff` share: two sides compared, and the files of a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from parity.comparison.compare import Comparison, compare, ending
from parity.comparison.pair import Pair
from parity.comparison.tolerance import Bounds
from parity.report.html import Report, write_report
from parity.report.verdict import Verdict
from parity.runs.sides import NAMES, SideResult
from trainspec.trace import Trace


def compare_sides(results: Sequence[SideResult], bounds: Callable[[Pair], Bounds]) -> Comparison:
    """Compare the traces of two sides; one that made no update has nothing to compare."""
    left, right = (side.trace for side in results)
    stopped = {name: side.stopped for name, side in zip(NAMES, results, strict=True) if side.stopped}
    if left is None or right is None:  # a side stopped before its first update
        return Comparison(0, tuple(ending((0, 0), stopped)))
    pair = Pair(left, right)
    return compare(pair, bounds(pair), stopped=stopped)


def traces_of(results: Sequence[SideResult]) -> tuple[Trace, Trace] | None:
    """Both traces, None if a side made no update."""
    left, right = (side.trace for side in results)
    return (left, right) if left and right else None


def write_report_of(
    verdict: Verdict,
    results: Sequence[SideResult],
    out: Path,
    *,
    recipe: str | None,
    settings: Sequence[str],
    recipes: Sequence[str],
    closer: Sequence[SideResult] = (),
    heads: Mapping[str, tuple[int, int]] | None = None,
    following: Sequence[tuple[str, str]] = (),
) -> None:
    """Write verdict.json and report.html into `out`.

    `closer` are the sides of the closer look that the first divergence is in, `heads` along which dimension a weight has heads and
    how many, `following` the commands that come next.
    """
    losses = [[record["loss"] for record in side.trace.steps] if side.trace else [] for side in results]
    verdict.write(out)
    report = Report(
        verdict, *losses, recipe=recipe, settings=tuple(settings), recipes=tuple(recipes),
        traces=traces_of(closer or results), heads=heads or {}, next=tuple(following),
    )  # fmt: skip
    write_report(out / "report.html", report)
