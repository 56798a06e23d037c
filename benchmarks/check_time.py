"""Where the time of `parity check` goes: seconds by program and phase, for the demo and for a model of 5 M parameters.

    python benchmarks/check_time.py [--only demo-fp64 ...] [--steps N] [--against FILE] [--json FILE]

Wall seconds are those of this machine with whatever else runs on it, so core seconds, which other load hardly changes,
stand beside them. A program's phases: `start` is to its first line (imports), `first` to its first pass (tokens, weights,
compilation), `passes` the others, `end` what comes after the last. The compilation cache is in --out, and empty at the
start of each case. With --against, another run's --json is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.check import check
from parity.runs.programs import Watcher
from parity.runs.sides import Side

ROOT = Path(__file__).parent.parent
PHASES = ("start", "first", "passes", "end")
# hidden 288 in four layers: 4.99 M parameters.
FIVE_MILLION = ("--hidden", "288", "--steps", "20")
CASES = {
    "demo-fp64": ("configs/demo.yaml", "fp64", False),
    "5m-fp64": ("configs/full.yaml", "fp64", True),
    "5m-bf16": ("configs/full.yaml", "bf16", True),
}
# The bar of the issue that this is held to: the demo's check in fp64, on two cores.
MOST_SECONDS = {"demo-fp64": 90.0}


@dataclass
class Mark:
    """A moment in a program's life: wall seconds since its start, and core seconds that it has used."""

    wall: float
    core: float


@dataclass
class Clock(Watcher):
    """Notes when programs start, print and end."""

    process: dict[str, int] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    marks: dict[str, list[Mark]] = field(default_factory=dict)
    passes: dict[str, list[Mark]] = field(default_factory=dict)

    def started(self, program: str, process: int) -> None:
        """Starts the program's clock."""
        self.process[program], self.began[program] = process, time.monotonic()
        self.marks[program], self.passes[program] = [], []

    def said(self, program: str, line: str) -> None:
        """Notes the line, and whether a pass was made before it."""
        core = core_seconds_of(self.process[program])
        mark = Mark(time.monotonic() - self.began[program], core)
        self.marks[program].append(mark)
        if line.startswith("step ") or line.startswith("reference of "):
            self.passes[program].append(mark)

    def ended(self, program: str) -> None:
        """Notes the end; the core seconds are those of the last line, as the process is gone."""
        last = self.marks[program][-1].core if self.marks[program] else 0.0
        self.marks[program].append(Mark(time.monotonic() - self.began[program], last))

    def phases(self, program: str) -> dict[str, tuple[float, float]]:
        """Of each phase, wall and core seconds."""
        marks, passes = self.marks[program], self.passes[program]
        ends = [marks[0], passes[0] if passes else marks[-1], passes[-1] if passes else marks[-1], marks[-1]]
        before, found = Mark(0.0, 0.0), {}
        for phase, end in zip(PHASES, ends, strict=True):
            found[phase] = (end.wall - before.wall, end.core - before.core)
            before = end
        return found


def main() -> None:
    """Run the cases and print a table of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--against", type=Path, help="the --json of an earlier run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build/check-time")
    arguments = parser.parse_args()
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    results = {}
    for case in arguments.only:
        results[case] = measured(case, arguments.steps, arguments.out)
        print("\n".join(table(case, results[case], before.get(case))), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measured(case: str, steps: int, out: Path) -> dict[str, Any]:
    """Wall and core seconds of the whole check, and of each program's phases."""
    recipe, precision, is_large = CASES[case]
    home = out / case
    shutil.rmtree(home, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((home / "jax-cache").absolute())
    overrides = [f"model.from={five_million(out)}"] if is_large else []
    clock, began, used = Clock(), time.monotonic(), core_seconds()
    verdict = check(
        ROOT / recipe, left=Side("jax"), right=Side("torch"),
        precision=precision,  # pyright: ignore[reportArgumentType]
        steps=steps, overrides=overrides, out=home / "check", watcher=clock,
    )  # fmt: skip
    programs = {name: clock.phases(name) for name in clock.marks}
    return {
        "verdict": verdict.word,
        "steps": steps,
        "wall": time.monotonic() - began,
        "core": core_seconds() - used,
        "programs": programs,
    }


def table(case: str, result: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """The lines that show one case."""
    bar = f", at most {MOST_SECONDS[case]:.0f} s wanted" if case in MOST_SECONDS else ""
    lines = [
        f"{case}: {result['verdict']}, {result['steps']} updates: {result['wall']:.1f} s on the wall{bar}, "
        f"{result['core']:.1f} core seconds"
        + (f"; before: {before['wall']:.1f} and {before['core']:.1f}" if before else ""),
        f"  {'program':12}" + "".join(f"{phase:>18}" for phase in PHASES) + "   (wall, core seconds)",
    ]
    for name, phases in result["programs"].items():
        cells = (f"{wall:.1f}, {core:.1f}" for wall, core in phases.values())
        lines.append(f"  {name:12}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def five_million(out: Path) -> Path:
    """The model of 5 M parameters, made once."""
    directory = out / "five-million"
    script = ROOT / "scripts/make_demo_model.py"
    subprocess.run(
        [sys.executable, str(script), str(directory), *FIVE_MILLION], check=True, capture_output=True
    )
    return directory


def core_seconds() -> float:
    """Those of this process and of all that have ended under it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def core_seconds_of(process: int) -> float:
    """Those of a process that runs; 0 on a system that does not tell."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
