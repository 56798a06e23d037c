"""Train every method on the demo's records on both backends, and draw the held-out losses in one picture.

    python benchmarks/learning_curves.py [--steps N] [--every N] [--only METHOD ...] [--page FILE]

The page gets a table and, beside it, a picture. A method that ends no better than the untrained model, or whose two
curves are apart, is an error, and no page is written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("jaxtrain", "torchtrain")
# Recipe and what is set in it for each curve, with the colour of its line.
CURVES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "full": ("configs/full.yaml", ("data.packing=true", "batch.accumulation=2"), "#111111"),
    "lora": ("configs/demo.yaml", (), "#d1495b"),
    "adapter": ("configs/adapter.yaml", (), "#00798c"),
    "prompt": ("configs/prompt.yaml", (), "#edae49"),
    "ptuning": ("configs/ptuning.yaml", (), "#7a5195"),
    "prefix": ("configs/prefix.yaml", (), "#3a7d44"),
}
UNTRAINED = re.compile(r"held-out loss (\S+)")
# Two curves whose losses differ by less are one line in the picture.
ON_TOP = 1e-3
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 120, 20, 40


@dataclass(frozen=True)
class Curve:
    """Held-out loss per target token: (step, loss), step 0 being the start of the run."""

    method: str
    backend: str
    points: tuple[tuple[int, float], ...]


def main() -> None:
    """Run all, print the table, and write the page where one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps from one measurement to the next")
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    curves = [
        curve_of(method, backend, steps=arguments.steps, every=arguments.every)
        for method in arguments.only
        for backend in BACKENDS
    ]
    untrained = curve_of("lora", "jaxtrain", steps=0, every=1).points[0][1]
    lines = table(curves, untrained)
    print("\n".join(lines))
    failed = [
        f"{c.method} on {c.backend} ends no better than the untrained model"
        for c in curves
        if c.points[-1][1] >= untrained
    ]
    failed += [
        f"{method}: the two backends' curves are {apart:.1e} apart"
        for method, apart in differences(curves).items()
        if apart > ON_TOP
    ]
    if failed:
        sys.exit("\n".join(failed))
    if arguments.page:
        picture = arguments.page.with_suffix(".svg")
        picture.write_text(drawn(curves, untrained))
        arguments.page.write_text(page(lines, picture.name, arguments.steps))


def curve_of(method: str, backend: str, *, steps: int, every: int) -> Curve:
    """The held-out losses of one run, and of its start; `steps` 0 gives the start alone."""
    recipe, extra, _ = CURVES[method]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        settings = (f"run.steps={max(steps, 1)}", f"run.eval_every_steps={every}", *extra)
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", backend]
        started = _output([*command, "eval", recipe, "--loss-only", "--untrained", "--out", str(out), *words])
        found = UNTRAINED.search(started)
        assert found, started
        points = [(0, float(found[1]))]
        if steps:
            _output([*command, "train", recipe, "--out", str(out), *words])
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            points += [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    print(f"{method} on {backend}: {points[0][1]:.4f} to {points[-1][1]:.4f}", file=sys.stderr)
    return Curve(method, backend, tuple(points))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    return done.stdout


def table(curves: list[Curve], untrained: float) -> list[str]:
    """One row per method: loss at the start and at the end on each backend, and how far the two curves are apart."""
    lines = [
        f"The untrained model's held-out loss is {untrained:.4f} per target token.",
        "",
        "| method | at the start | at the end, JAX | at the end, torch | largest difference of the two curves |",
        "|---|---|---|---|---|",
    ]
    apart = differences(curves)
    for ours, theirs in zip(curves[::2], curves[1::2], strict=True):
        lines.append(
            f"| {ours.method} | {ours.points[0][1]:.4f} | {ours.points[-1][1]:.4f} | {theirs.points[-1][1]:.4f} "
            f"| {apart[ours.method]:.1e} |"
        )
    return lines


def differences(curves: list[Curve]) -> dict[str, float]:
    """How far the two backends' curves of each method are apart at most."""
    return {
        ours.method: max(abs(a - b) for (_, a), (_, b) in zip(ours.points, theirs.points, strict=True))
        for ours, theirs in zip(curves[::2], curves[1::2], strict=True)
    }


def page(lines: list[str], picture: str, steps: int) -> str:
    """The page's text around the table."""
    head = (
        "# Every method learns, on both backends alike",
        "",
        f"The demo's model and records, fp32, {steps} updates, each method with the settings of its recipe in `configs/`. Broad lines are",
        "JAX's, dashed ones on top of them torch's. Made by `python benchmarks/learning_curves.py --page docs/learning-curves.md`.",
        "",
        f"![held-out loss of six methods on two backends]({picture})",
        "",
    )
    return "\n".join((*head, *lines)) + "\n"


def drawn(curves: list[Curve], untrained: float) -> str:
    """All curves as SVG."""
    losses = [loss for curve in curves for step, loss in curve.points if step] + [untrained]
    low, high = min(losses), max(losses) + 0.1 * (max(losses) - min(losses))
    last = max(step for curve in curves for step, _ in curve.points)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + step / last * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - min(loss, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marks = ['<rect width="100%" height="100%" fill="white"/>']
    for i in range(6):
        loss = low + i / 5 * (high - low)
        x, y = place(0, loss)
        marks.append(f'<line x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        marks.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        step = round(i / 5 * last)
        marks.append(
            f'<text x="{place(step, low)[0]:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{step}</text>'
        )
    x, y = place(0, untrained)
    marks.append(
        f'<line x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888888" stroke-dasharray="2 3"/>'
        f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="#666666">untrained</text>'
    )
    for curve in curves:
        colour, is_jax = CURVES[curve.method][2], curve.backend == "jaxtrain"
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve.points)
        style = 'stroke-width="5" opacity="0.35"' if is_jax else 'stroke-width="1.6" stroke-dasharray="6 4"'
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>')
    marks += _labels([curve for curve in curves if curve.backend == "jaxtrain"], place)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
        f"<title>Held-out loss per target token over the updates</title>{''.join(marks)}</svg>\n"
    )


def _labels(curves: list[Curve], place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """The methods' names at the ends of their curves, moved apart where they would overlap."""
    marks, taken = [], -1e9
    for curve in sorted(curves, key=lambda c: -c.points[-1][1]):
        y = max(place(*curve.points[-1])[1], taken + 15)
        taken = y
        marks.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="{CURVES[curve.method][2]}">{curve.method}</text>'
        )
    return marks


if __name__ == "__main__":
    main()
