"""The commands that come next after a verdict, each with what it is for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from parity.report.verdict import Verdict

MORE_STEPS = 3


def next_commands(verdict: Verdict, arguments: Sequence[str], out: Path) -> tuple[tuple[str, str], ...]:
    """(command, purpose); `arguments` are those of the check, without precision and steps. `out` is where it wrote."""
    first, steps = verdict.comparison.first_divergence, verdict.comparison.steps

    def again(*more: str) -> str:
        return shlex.join(["parity", "check", *arguments, *more])

    if first is None:
        others = {"fp64": "fp32", "fp32": "fp64", "bf16": "fp64"}
        other = others[verdict.precision]
        why = (
            "the same in float64, which is the proof: it sees what is smaller than rounding"
            if other == "fp64"
            else "the same in the precision of a real run: types, casts and sums are held to what rounding explains"
        )
        return (
            (again("--precision", other, "--steps", str(steps)), why),
            (
                again("--precision", verdict.precision, "--steps", str(MORE_STEPS * steps)),
                "more updates: the schedule further on, other batches, moments that have grown",
            ),
        )
    step = str(max(1, first.location.step))
    commands = []
    if verdict.precision != "fp64":
        commands.append(
            (
                again("--precision", "fp64", "--steps", step),
                "whether it is a mistake or rounding: a mistake of the algorithm shows in float64 as well, one of types does not",
            )
        )
    commands.append(
        (
            again("--precision", verdict.precision, "--steps", step),
            "after a change of the code: no more updates than it takes to show",
        )
    )
    closer = out / "first-divergence"
    home = closer if (closer / "left/trace").is_dir() else out
    traces = [str(home / side / "trace") for side in ("left", "right")]
    commands.append(
        (
            shlex.join(["parity", "diff", *traces, "--precision", verdict.precision]),
            "the two traces again without training, such as with a trace of your own in the place of one",
        )
    )
    return tuple(commands)
