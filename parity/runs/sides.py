"""A side of a comparison: a backend with its own overrides, run as a separate program.

JAX and torch never share a process: each side is `python -m jaxtrain` or `python -m torchtrain`, on the cores (with as
many fake devices or processes as its plan needs) or on a device, and only its trace is read afterwards.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import assert_never, cast

from parity.comparison.pair import NAMES
from parity.runs.join import join
from parity.runs.programs import Launcher
from trainspec.backends import BACKENDS
from trainspec.checkpoints.folders import checkpoint_name
from trainspec.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_MACHINE,
    EXIT_USER_ERROR,
    MachineError,
    UserError,
    nearest,
)
from trainspec.failures import without_saved
from trainspec.plans.names import DEVICES, Backend, Device, DeviceKind, Policy
from trainspec.trace import STOPPED_FILE, Trace

# A side is named by its backend or by its program.
PROGRAMS: dict[str, Backend] = {
    word: name for name, backend in BACKENDS.items() for word in (name, backend.program)
}
# A check compares updates: it saves no checkpoints on the way and measures no held-out loss, not even after the last one.
NEVER = 10**9


@dataclass(frozen=True)
class Side:
    """A backend and the `a.b=c` overrides that only this side gets; `device` is its own, None that of the check."""

    backend: Backend
    overrides: tuple[str, ...] = ()
    device: Device | None = None

    def __str__(self) -> str:
        own = f"@{self.device}" if self.device else ""
        return " ".join((f"{self.backend}{own}", *self.overrides))


@dataclass(frozen=True)
class SideResult:
    """A side's trace, None if it has no step, and why the training stopped itself (a non-finite loss), if it did."""

    trace: Trace | None
    stopped: str | None = None


def parse_side(text: str) -> Side:
    """`jax plan.data=2`, `torch@cpu` -> Side. Raises UserError unless it is a backend, perhaps @DEVICE, and KEY=VALUE."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"side {text!r}: {error}; write it like 'jax plan.data=2'") from None
    first, at, device = (words or [""])[0].partition("@")
    if first not in PROGRAMS:
        raise UserError(f"side {text!r}: the first word is the backend{nearest(first, tuple(BACKENDS))}")
    if at and device not in DEVICES:
        raise UserError(f"side {text!r}: after @ comes the device{nearest(device, DEVICES)}")
    for word in words[1:]:
        if "=" not in word:
            raise UserError(f"side {text!r}: {word!r} is not KEY=VALUE, such as plan.data=2")
    return Side(PROGRAMS[first], tuple(words[1:]), cast(Device, device) if at else None)


@dataclass(frozen=True)
class Resumption:
    """Which `sides` train in two parts, the second resumed from a checkpoint `after` that step.

    With `from_other` the one side continues from the other's checkpoint instead of its own.
    """

    after: int
    sides: tuple[str, ...] = NAMES
    from_other: bool = False

    def describe(self, name: str) -> str:
        """How a side trains, to go after its settings; empty if it trains in one part."""
        if name not in self.sides:
            return ""
        whose = " from the other side's checkpoint" if self.from_other else ""
        return f", resumed after step {self.after}{whose}"


def parse_resumption(text: str, *, from_other: bool) -> Resumption:
    """`2`, `left:2` or `right:2` -> Resumption. Raises UserError for anything else."""
    name, _, number = text.rpartition(":")
    if name and name not in NAMES:
        raise UserError(f"--resume-at {text}: the word before the colon is a side{nearest(name, NAMES)}")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--resume-at {text}: {number!r} is not a step; write it like 2, left:2 or right:2")
    if from_other and not name:
        raise UserError(
            f"--resume-at {text}: both sides cannot continue from each other; write left:{number} or right:{number}"
        )
    return Resumption(int(number), (name,) if name else NAMES, from_other)


@dataclass(frozen=True)
class SideTraining:
    """A side of a check and what it trains; everything goes under `out`/`name`.

    Its methods raise UserError, naming the side, for what the backend reports as a user's mistake and for a crash, and
    MachineError for a failure of the machine. With `activations_at` the trace has that step's activations and their
    gradients. What an earlier check left is removed by `clear`.
    """

    side: Side
    name: str
    recipe: Path
    overrides: Sequence[str]
    precision: Policy
    out: Path
    launcher: Launcher = field(default_factory=Launcher)
    device: DeviceKind = "cpu"

    @property
    def home(self) -> Path:
        """The directory of the side."""
        return self.out / self.name

    @property
    def trace(self) -> Path:
        """Where its trace will be."""
        return self.home / "trace"

    def run(
        self, steps: int, *, activations_at: int | None = None, checkpoint_at: int | None = None
    ) -> SideResult:
        """Train `steps` updates in one part; `checkpoint_at` saves a checkpoint on the way, for the other side."""
        return self._part(steps, "trace", activations_at=activations_at, checkpoint_at=checkpoint_at)

    def run_in_two(self, steps: int, *, after: int, activations_at: int | None = None) -> SideResult:
        """Train up to `after`, then resume from that checkpoint and train up to `steps`; the trace is of both parts."""
        first = self._part(after, "part-1", activations_at=activations_at)
        return first if first.stopped else self._resume(first, steps, activations_at)

    def continue_from(
        self,
        other: SideTraining,
        before: SideResult,
        steps: int,
        *,
        after: int,
        activations_at: int | None = None,
    ) -> SideResult:
        """Resume from the checkpoint of another side, whose trace `before` has the steps up to `after`."""
        name = checkpoint_name(after)
        saved = other.home / "run" / "checkpoints" / name
        if not saved.is_dir():  # the other side stopped itself before
            return SideResult(before.trace, stopped=f"has no checkpoint of the other side after step {after}")
        shutil.copytree(saved, self.home / "run" / "checkpoints" / name)
        return self._resume(before, steps, activations_at)

    def clear(self) -> None:
        """Remove what an earlier check left."""
        for old in ("run", "trace", "part-1", "part-2"):
            shutil.rmtree(self.home / old, ignore_errors=True)

    def _resume(self, first: SideResult, steps: int, activations_at: int | None) -> SideResult:
        second = self._part(steps, "part-2", activations_at=activations_at, resume=True)
        if first.trace is None or second.trace is None:
            return replace(first, stopped=second.stopped)
        return replace(second, trace=join(first.trace, second.trace, self.trace))

    def _part(
        self,
        steps: int,
        trace: str,
        *,
        activations_at: int | None,
        checkpoint_at: int | None = None,
        resume: bool = False,
    ) -> SideResult:
        """Train up to step `steps` and read the trace; the log is log.txt, or log-2.txt of a second part."""
        program, directory = BACKENDS[self.side.backend].program, self.home / trace
        command = [sys.executable, "-m", program]
        command += self.arguments(
            steps, directory, activations_at=activations_at, checkpoint_at=checkpoint_at, resume=resume
        )
        self.home.mkdir(parents=True, exist_ok=True)
        log = self.home / ("log-2.txt" if resume else "log.txt")
        code, last = self.launcher.run(self.name, command, log=log, device=self.device)
        return self.result(code, last, log=log, trace=directory)

    def arguments(
        self,
        steps: int,
        trace: Path,
        *,
        activations_at: int | None = None,
        checkpoint_at: int | None = None,
        resume: bool = False,
    ) -> list[str]:
        """The command line of the backend's program that trains up to step `steps` and writes `trace`."""
        settings = [*self.overrides, *self.side.overrides]
        settings += _check_settings(self.precision, steps, checkpoint_at)
        words = ["train", str(self.recipe), *as_options(settings)]
        words += ["--out", str(self.home / "run"), "--trace", str(trace)]
        words += ["--resume"] if resume else []
        return [*words, "--activations", str(activations_at)] if activations_at else words

    def result(self, code: int, last: str, *, log: Path, trace: Path) -> SideResult:
        """What a program left that ended with `code`, `last` its last line. Raises UserError or MachineError for a failed one."""
        where, speaker = f"{self.name} ({self.side})", f"{BACKENDS[self.side.backend].program}: "
        # Nobody resumes a run of a check, so what it saved is no news to the user.
        said = without_saved(last.removeprefix(speaker))
        if code == EXIT_DONE:
            return SideResult(Trace(trace))
        # Python itself exits with 1 if a program cannot be loaded.
        if code == EXIT_FAILED and last.startswith(speaker):
            records = trace / "trace.jsonl"
            made_a_step = records.is_file() and records.stat().st_size > 0
            has_steps = made_a_step or (trace / STOPPED_FILE).is_file()
            return SideResult(Trace(trace) if has_steps else None, stopped=said)
        raise failure_of(where, code, said, log=log)


def failure_of(where: str, code: int, said: str, *, log: Path) -> UserError | MachineError:
    """What a side's failed program comes to, in the words that it `said` last. `where` names the side."""
    if code == EXIT_USER_ERROR:
        return UserError(f"{where}: {said}")
    whole = f"the whole log is {log}"
    if code == EXIT_MACHINE:
        return MachineError(f"{where}: {said}; {whole}")
    if code < 0:
        return MachineError(f"{where}: was ended by {Signals(-code).name}: {said}; {whole}")
    return UserError(f"{where}: crashed with exit code {code}: {said}; {whole}")


def resolved_recipe(out: Path, name: str) -> str:
    """The recipe that a side trained, with every default, as written under `out`/`name`."""
    return (out / name / "run" / "recipe.yaml").read_text(encoding="utf-8")


def _check_settings(precision: Policy, steps: int, checkpoint_at: int | None) -> list[str]:
    """What a check changes in a recipe: precision and number of updates, and nothing else that affects an update."""
    settings = [f"run.stop_after_steps={steps}"]
    settings += [
        f"checkpoint.every_steps={checkpoint_at or NEVER}",
        "data.heldout=null",
        "checkpoint.keep_best=0",
        "run.eval_generations=0",
    ]
    settings += [f"checkpoint.keep={NEVER}"] if checkpoint_at else []
    return [*settings, *precision_settings(precision)]


def as_options(settings: Sequence[str]) -> list[str]:
    """Settings of a recipe as words of a command line."""
    return [word for setting in settings for word in ("--set", setting)]


def precision_settings(precision: Policy) -> list[str]:
    """What a precision changes in a recipe."""
    settings = [f"precision.policy={precision}"]
    match precision:
        case "fp64" | "fp32":
            return [*settings, f"precision.reduce={precision}"]
        case "bf16":
            return settings  # the recipe says in which type bf16 sums
        case other:
            assert_never(other)
