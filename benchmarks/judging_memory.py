"""How much memory judging two traces takes: its peak, beside the largest tensor and beside what a trace holds of a step.

    python benchmarks/judging_memory.py [--tensors 100] [--rows 256] [--columns 256] [--steps 3] [--held-mib 0]

Two traces of that many float32 tensors of equal size are written, without a model, with a float64 reference and its draws, and
judged under the bounds of each precision. The peak is that of Python's own allocations, numpy's arrays among them (tracemalloc).
`--held-mib` is what a comparison may keep of tensors that it has read; what is counted beside it is the arithmetic of one.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from parity.comparison import measured_bounds
from parity.comparison.adam import AdamRule
from parity.comparison.compare import Comparison, compare
from parity.comparison.estimated_bounds import EstimatedBounds
from parity.comparison.measured_bounds import MeasuredBounds, Measurement, Summation
from parity.comparison.pair import Pair
from parity.comparison.recent import HELD_BYTES
from parity.comparison.tolerance import Bounds, ProofBounds
from trainspec.recipe import AdamW
from trainspec.trace import StepTrace, Trace, TraceName, TraceWriter

Arrays = dict[str, NDArray[Any]]
DRAWS = 4
LR, TOKENS = 1e-3, 64
# A reference differs from a run by this share, and a draw from its reference: what rounding to float32 does, and some.
ROUNDING = 1e-6


def write_pair(home: Path, *, tensors: int, rows: int, columns: int, steps: int) -> None:
    """Two traces of a run of AdamW on random gradients, `home`/left and right, and what measures their bounds."""
    rule = AdamRule(AdamW(lr=LR), frozenset())
    names = [f"layers.{i}.linear.weight" for i in range(tensors)]
    order = [TraceName(name, "linear", i) for i, name in enumerate(names)]
    shape = (rows, columns)
    writers = {side: TraceWriter(home / side) for side in ("left", "right", "reference")}
    start = {name: _normal(shape, 0, i) for i, name in enumerate(names)}
    for side, writer in writers.items():
        writer.initial({} if side == "reference" else start, order)
    (home / "movement").mkdir()
    weights = {side: dict(start) for side in ("left", "right")}
    moments = {
        side: [{name: np.zeros(shape, np.float32) for name in names} for _ in range(2)] for side in weights
    }
    for step in range(1, steps + 1):
        exact = {name: _normal(shape, step, i).astype(np.float64) for i, name in enumerate(names)}
        loss = 2.0 * TOKENS
        norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in exact.values()))
        none: Arrays = {}
        for number, side in enumerate(weights):
            gradients = {
                name: (g * (1 + ROUNDING / 4 * _normal(shape, step, i, number + 1))).astype(np.float32)
                for i, (name, g) in enumerate(exact.items())
            }
            own = math.sqrt(sum(float(np.sum(np.square(g.astype(np.float64)))) for g in gradients.values()))
            updates: Arrays = {}
            for name, gradient in gradients.items():
                before = weights[side][name]
                for phase, moment in zip(("moment1", "moment2"), moments[side], strict=True):
                    made, _ = rule.moment(
                        phase,
                        gradient.astype(np.float64),
                        moment[name].astype(np.float64),
                        factor=rule.clip_factor(own),
                    )
                    moment[name] = made.astype(np.float32)
                wide = [moment[name].astype(np.float64) for moment in moments[side]]
                change = rule.update(name, before.astype(np.float64), *wide, lr=LR, step=step)
                weights[side][name] = (before + change).astype(np.float32)
                updates[name] = weights[side][name] - before
            one, two = (dict(moment) for moment in moments[side])
            writers[side].step(
                StepTrace(step, _batch(step), loss, TOKENS, own, LR, gradients, updates, one, two)
            )
        reference = StepTrace(step, _batch(step), loss, TOKENS, norm, LR, exact, none, none, none)
        writers["reference"].step(reference)
        save_file(dict(_movement(exact)), home / f"movement/step-{step:06d}.safetensors")


def _normal(shape: tuple[int, ...], *key: int) -> NDArray[np.float32]:
    return np.random.default_rng(key).standard_normal(shape, dtype=np.float32)


def _batch(step: int) -> Arrays:
    return {"input_ids": np.full((4, 16), step, np.int32)}


def _movement(exact: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """Mean squares of draws that move every element by `ROUNDING` of itself."""
    yield "loss/rows", np.full(1, ROUNDING**2)
    for name, gradient in exact.items():
        square = np.square(ROUNDING * gradient)
        yield f"gradient/{name}/rows", square.mean(axis=1)
        yield f"gradient/{name}/columns", square.mean(axis=0)
        yield f"gradient/{name}/elements", square.astype(np.float32)


def bounds_of(home: Path) -> dict[str, Callable[[Pair], Bounds]]:
    """How the pair is judged: as the proof, by estimated and by measured bounds."""

    def measured(pair: Pair) -> Bounds:
        reference = Trace(home / "reference")
        return MeasuredBounds(
            pair, "fp32", measurement=Measurement((reference, reference), home / "movement", DRAWS),
            rule=AdamRule(AdamW(lr=LR), frozenset()), summation=Summation("fp32"),
        )  # fmt: skip

    return {
        "proof": ProofBounds,
        "estimated": lambda pair: EstimatedBounds(pair, "fp32"),
        "measured": measured,
    }


def judged(home: Path, make: Callable[[Pair], Bounds], *, held_bytes: int) -> tuple[Comparison, int]:
    """The comparison of the pair, and the peak of its memory in bytes, of which `held_bytes` may be tensors read before."""
    usual = measured_bounds.HELD_BYTES
    measured_bounds.HELD_BYTES = held_bytes
    tracemalloc.start()
    try:
        pair = Pair(Trace(home / "left"), Trace(home / "right"), held_bytes=held_bytes)
        comparison = compare(pair, make(pair))
        return comparison, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        measured_bounds.HELD_BYTES = usual


def main() -> None:
    """Write the traces, judge them, and print a row for each kind of bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--held-mib", type=float, default=0.0, help=f"of a check: {HELD_BYTES >> 20}")
    args = parser.parse_args()
    print(f"$ {shlex.join(['python', *sys.argv])}")
    print(f"{platform.platform()}, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory(prefix="judging-") as scratch:
        home = Path(scratch)
        write_pair(home, tensors=args.tensors, rows=args.rows, columns=args.columns, steps=args.steps)
        largest = 4 * args.rows * args.columns
        step = sum(
            (home / side / "step-000001.safetensors").stat().st_size
            for side in ("left", "right", "reference")
        )
        print(
            f"{args.tensors} tensors of {largest / 2**20:.1f} MiB in float32; a step of all traces {step / 2**20:.0f} MiB"
        )
        print(
            f"{'bounds':<12}{'locations':>10}{'failing':>9}{'peak MiB':>10}{'÷ largest':>11}{'÷ a step':>10}"
        )
        for name, make in bounds_of(home).items():
            found, peak = judged(home, make, held_bytes=int(args.held_mib * 2**20))
            failing = sum(not finding.holds for finding in found.findings)
            print(
                f"{name:<12}{len(found.findings):>10}{failing:>9}{peak / 2**20:>10.1f}{peak / largest:>11.1f}{peak / step:>10.3f}"
            )


if __name__ == "__main__":
    main()
