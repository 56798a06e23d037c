"""A side of a comparison: a backend with its own overrides, run as a separate program.

JAX and torch never share a process: each side is `python -m jaxtrain` or `python -m torchtrain`, on CPU (with as
many fake devices or processes as its plan needs), and only its trace is read afterwards.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import assert_never

from trainspec.backends import BACKENDS
from trainspec.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_MACHINE,
    EXIT_USER_ERROR,
    MachineError,
    UserError,
    nearest,
)
from trainspec.failures import NOTHING_SAVED
from trainspec.plans.plan import Backend, Policy
from trainspec.trace import Trace

# A side is named by its backend or by its program.
PROGRAMS: dict[str, Backend] = {
    word: name for name, backend in BACKENDS.items() for word in (name, backend.program)
}
# A check compares updates: it saves no checkpoints on the way and measures no held-out loss.
NEVER = 10**9
# The proof is about arithmetic, not devices: both sides run on the CPU, whatever this machine has.
CPU_ONLY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# A check runs the same programs again, for its reference or a failing step, so slow compilations are cached.
COMPILE_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("build/jax-cache").absolute()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
# Threads that spin while waiting take the cores from working ones: up to five times the wall time in torch.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True)
class Side:
    """A backend and the `a.b=c` overrides that only this side gets."""

    backend: Backend
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.backend, *self.overrides))


@dataclass(frozen=True)
class SideResult:
    """A side's trace, None before its first update, and why the training stopped itself (a non-finite loss), if it did."""

    trace: Trace | None
    stopped: str | None = None


def parse_side(text: str) -> Side:
    """`jax plan.data=2 plan.tensor=2` -> Side. Raises UserError unless it is a backend followed by KEY=VALUE."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"side {text!r}: {error}; write it like 'jax plan.data=2'") from None
    if not words or words[0] not in PROGRAMS:
        first = words[0] if words else ""
        raise UserError(f"side {text!r}: the first word is the backend{nearest(first, tuple(BACKENDS))}")
    for word in words[1:]:
        if "=" not in word:
            raise UserError(f"side {text!r}: {word!r} is not KEY=VALUE, such as plan.data=2")
    return Side(PROGRAMS[words[0]], tuple(words[1:]))


def run_side(
    side: Side, *, name: str, recipe: Path, overrides: Sequence[str], precision: Policy,
    steps: int, out: Path, activations_at: int | None = None,
) -> SideResult:  # fmt: skip
    """Train `steps` updates and read the trace. Everything goes under `out`/`name`, the log to log.txt there.

    With `activations_at` the trace has that step's activations and their gradients.

    Raises UserError, naming the side, for what the backend reports as a user's mistake and for a crash; MachineError
    for a failure of the machine.
    """
    home = out / name
    for old in (home / "run", home / "trace"):
        shutil.rmtree(old, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    settings = [*overrides, *side.overrides, *_check_settings(precision, steps)]
    program = BACKENDS[side.backend].program
    command = [sys.executable, "-m", program, "train", str(recipe)]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--out", str(home / "run"), "--trace", str(home / "trace")]
    if activations_at:
        command += ["--activations", str(activations_at)]
    code, last = run_program(command, log=home / "log.txt")
    where, speaker = f"{name} ({side})", f"{program}: "
    # A check saves nothing before its last step, so this is no news to the user.
    said = last.removeprefix(speaker).removesuffix(f"; {NOTHING_SAVED}")
    if code == EXIT_DONE:
        return SideResult(Trace(home / "trace"))
    # Python itself exits with 1 if a program cannot be loaded.
    if code == EXIT_FAILED and last.startswith(speaker):
        records = home / "trace" / "trace.jsonl"
        made_a_step = records.is_file() and records.stat().st_size > 0
        return SideResult(Trace(home / "trace") if made_a_step else None, stopped=said)
    if code == EXIT_USER_ERROR:
        raise UserError(f"{where}: {said}")
    log = f"the whole log is {home / 'log.txt'}"
    if code == EXIT_MACHINE:
        raise MachineError(f"{where}: {said}; {log}")
    if code < 0:
        raise MachineError(f"{where}: was ended by {Signals(-code).name}: {said}; {log}")
    raise UserError(f"{where}: crashed with exit code {code}: {said}; {log}")


def resolved_recipe(out: Path, name: str) -> str:
    """The recipe that a side trained, with every default, as written under `out`/`name`."""
    return (out / name / "run" / "recipe.yaml").read_text(encoding="utf-8")


def _check_settings(precision: Policy, steps: int) -> list[str]:
    """What a check changes in a recipe: precision and number of updates, and nothing else that affects an update."""
    settings = [f"precision.policy={precision}", f"run.stop_after_steps={steps}"]
    settings += [f"checkpoint.every_steps={NEVER}", f"run.eval_every_steps={NEVER}"]
    match precision:
        case "fp64" | "fp32":
            return [*settings, f"precision.reduce={precision}"]
        case "bf16":
            return settings  # the recipe says in which type bf16 sums
        case other:
            assert_never(other)


def run_program(command: Sequence[str], *, log: Path) -> tuple[int, str]:
    """Run to the end with all output in `log`, and on the terminal if there is one.

    Returns the exit code and the last non-empty line.
    """
    watched, last = sys.stderr.isatty(), ""
    environment = QUIET_THREADS | COMPILE_CACHE | os.environ | CPU_ONLY
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as child:  # fmt: skip
        assert child.stdout is not None
        file.write(f"$ {shlex.join(command)}\n")
        for line in child.stdout:
            file.write(line)
            last = line.strip() or last
            if watched:
                sys.stderr.write(line)
    return child.returncode, last
