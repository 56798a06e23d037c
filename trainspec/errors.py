"""What ends a command with one line: a user's mistake, a machine that failed, a loss that is not finite, a request to stop."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

# Exit codes of every program. A failed verdict, or training that stopped itself, is 1.
EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_MACHINE = 0, 1, 2, 3
EXIT_CRASHED = 70  # a mistake of ours, reported with its stack: EX_SOFTWARE of sysexits.h
EXIT_STOPPED = 75  # asked to stop, and saved; to be continued: EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class UserError(Exception):
    """A mistake of the user: one line that says what, where, and the way out. Exit code 2."""


class RecipeError(UserError):
    """The recipe cannot be run as it is."""


class ModelError(UserError):
    """A model directory or its config.json is missing, malformed or of an unsupported architecture."""


class WeightsError(UserError):
    """A weight is missing, unexpected, of the wrong shape, or its file is damaged."""


class DataError(UserError):
    """A data file is missing or malformed, or holds no usable record."""


class PlanError(UserError):
    """The plan does not work on this backend; the message names the nearest plan that does."""


class TraceError(UserError):
    """A trace is missing, incomplete or not comparable with the other."""


class MachineError(Exception):
    """The machine failed: its memory, a device, a driver, a disk, the network. Exit code 3, as for every OSError."""


class ProcessError(Exception):
    """One of several processes ended the run: its line and its exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class NonFiniteLossError(Exception):
    """Loss or gradient is NaN or infinite. Raised before the update, so the weights are still good. Exit code 1.

    `metrics` are the step's (`step.Metrics`), with what it was asked to keep.
    """

    def __init__(self, line: str, metrics: Any = None) -> None:
        super().__init__(line)
        self.metrics = metrics


class StoppedError(BaseException):
    """A run was asked to stop, and stops at a safe point: what it has done is saved, if there is any. Exit code 75.

    Like KeyboardInterrupt no Exception: before training begins, a signal raises it anywhere. `step` is the last one made.
    """

    def __init__(self, asked: str, step: int | None = None) -> None:
        when = f"after step {step}" if step else "before its first update"
        super().__init__(f"stopped by {asked} {when}")


class Note(str):
    """The end of an error's line, added (`add_note`) by a caller that knows more than the code that raised it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of `known`, or else a list of `known`."""
    options = sorted(known)
    return meant(word, options) or f"; known here: {', '.join(options)}"


def meant(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of `known`; nothing where none is close."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe_os_error(error: OSError) -> str:
    """The file, where it is known, and the system's own message; or the text of an error that has only a text."""
    if error.strerror is None:
        return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    names = (error.filename, error.filename2)
    files = " -> ".join(os.fsdecode(n) for n in names if isinstance(n, str | bytes | os.PathLike))
    return f"{files}: {error.strerror}" if files else error.strerror
