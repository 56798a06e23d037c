"""How long it takes from a command to its first update, beside Hugging Face's Trainer; to `--help`, and to a refusal.

    python benchmarks/start_up.py [--rounds N] [--method lora] [--policy fp32] [--tiny]

Every command has an empty compilation cache once (`cold`), and then in every round the one that it filled (`warm`). Files are
in the system's cache after the first round, so the median is that of a second start.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from bench_recipe import HOME, METHODS, ROOT, Case, launch
from turns import command_line, machine

CACHE, OUT = HOME / "start-up-cache", HOME / "start-up-run"


class Start(NamedTuple):
    """A command, the line that it is timed to (None: its end), and whether it has a compilation cache to fill."""

    name: str
    command: Sequence[str]
    line: str | None
    compiles: bool = False


class Seconds(NamedTuple):
    """On the wall, and of all cores together."""

    wall: float
    core: float


def main() -> None:
    """Time every command and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", choices=tuple(METHODS), default="lora")
    parser.add_argument("--policy", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tiny", action="store_true", help="a small model: only to see that everything runs")
    arguments = parser.parse_args()
    case = Case("28m", arguments.method, arguments.policy)
    starts = list(commands(case.tiny() if arguments.tiny else case))
    print(
        f"`{command_line()}`\n\n{machine()}\n\n| | cold, s | warm, s | warm, core s |\n|---|---|---|---|",
        flush=True,
    )
    shutil.rmtree(CACHE, ignore_errors=True)
    cold = {start.name: timed(start) for start in starts}
    warm: dict[str, list[Seconds]] = {start.name: [] for start in starts}
    for number in range(arguments.rounds):
        for start in starts if number % 2 == 0 else starts[::-1]:
            warm[start.name].append(timed(start))
    for start in starts:
        rounds = warm[start.name]
        cells = [
            f"{cold[start.name].wall:.1f}" if start.compiles else "",
            f"{median(each.wall for each in rounds):.2f}",
            f"{median(each.core for each in rounds):.2f}",
        ]
        print("| " + " | ".join([start.name, *cells]) + " |")


def commands(case: Case) -> list[Start]:
    """What is timed: both programs and, on the same recipe, the Trainer and torch eager."""
    recipe = str(case.write())
    starts: list[Start] = []
    for program in ("jaxtrain", "torchtrain"):
        module = [sys.executable, "-m", program]
        train = [*module, "train", recipe, "--out", str(OUT / program)]
        starts.append(Start(f"{program} --help", [*module, "--help"], None))
        starts.append(Start(f"{program}, a refusal", [*train, "--set", "plan.reamt=full"], None))
        starts.append(Start(f"{program}, first update", train, r"^step +1\b", compiles=program == "jaxtrain"))
    for program in ("eager", "trainer"):
        # Its worker answers after its first update.
        starts.append(Start(f"{program}, first update", launch(program, case.write()).command, r"seconds"))
    return starts


def timed(start: Start) -> Seconds:
    """Seconds until the command writes its line, or ends. It is stopped there."""
    shutil.rmtree(OUT, ignore_errors=True)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    used, began = _core_seconds(), time.perf_counter()
    with subprocess.Popen(
        start.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        is_there = start.line is None
        for line in process.stdout:
            if start.line is not None and re.search(start.line, line):
                is_there = True
                break
        wall = time.perf_counter() - began
        process.kill()
    if not is_there:
        raise SystemExit(f"{' '.join(start.command)}: ended before it wrote a line like {start.line!r}")
    return Seconds(wall, _core_seconds() - used)


def _core_seconds() -> float:
    """Those of all programs that have ended under this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
