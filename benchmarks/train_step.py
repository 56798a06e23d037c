"""Time the train step of both backends on one recipe, in turns, each in a process of its own.

    python benchmarks/train_step.py [RECIPE] [--rounds N] [--steps N]

The backends alternate so that a busy machine slows both; the ratio is taken within a round. The first steps of a
run hold compilation and warm-up and are told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

BACKENDS = ("jaxtrain", "torchtrain")
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Timing:
    """One run: seconds of the first step, median seconds and target tokens per second of the warm ones."""

    first_seconds: float
    step_seconds: float
    tokens_per_second: float


def main() -> None:
    """Run the rounds and print one line per backend and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/text.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help=f"more than the {WARM_UP_STEPS} of warm-up")
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        order = BACKENDS if number % 2 == 0 else BACKENDS[::-1]
        rounds.append({backend: time_run(backend, arguments.recipe, arguments.steps) for backend in order})
    print(f"{arguments.recipe}: {arguments.rounds} rounds of {arguments.steps} steps, medians")
    for backend in BACKENDS:
        runs = [timings[backend] for timings in rounds]
        print(
            f"{backend:10}  {median(r.step_seconds for r in runs) * 1e3:8.1f} ms/step"
            f"  {median(r.tokens_per_second for r in runs):9,.0f} target tokens/s"
            f"  first step {median(r.first_seconds for r in runs):.1f} s"
        )
    ratio = median(r["torchtrain"].step_seconds / r["jaxtrain"].step_seconds for r in rounds)
    print(f"a step of torchtrain takes {ratio:.2f} times as long as one of jaxtrain")


def time_run(backend: str, recipe: Path, steps: int) -> Timing:
    """Train `steps` updates with nothing in between and read the times off metrics.jsonl."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        settings = (f"run.steps={steps}", "data.heldout=null", f"checkpoint.every_steps={steps}")
        command = [sys.executable, "-m", backend, "train", str(recipe), "--out", str(out)]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    warm = slice(WARM_UP_STEPS, None)
    return Timing(
        first_seconds=seconds[0],
        step_seconds=median(seconds[warm]),
        tokens_per_second=median(row["tokens_per_second"] for row in rows[warm]),
    )


if __name__ == "__main__":
    main()
