"""What ends a command: a user's mistake, a machine that failed, a loss that is no number. One line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What every program ends with. A failed verdict, or a training that stopped itself, is 1.
EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_MACHINE = 0, 1, 2, 3
EXIT_CRASHED = 70  # a mistake of ours, told with its stack: EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class UserError(Exception):
    """A mistake of the user at the command line: says what, where, and the way out, in one line. Exit code 2."""


class RecipeError(UserError):
    """The recipe does not say something that can be run."""


class ModelError(UserError):
    """A model directory or its config.json is missing, malformed or of an unsupported architecture."""


class WeightsError(UserError):
    """A weight is missing, unexpected, of the wrong shape, or its file is damaged."""


class DataError(UserError):
    """A data file is missing or malformed, or holds no usable record."""


class PlanError(UserError):
    """The plan cannot work on this backend; the message names the nearest plan that does."""


class TraceError(UserError):
    """A trace is missing, incomplete or not comparable with the other."""


class MachineError(Exception):
    """The machine failed: its memory, a device, a driver, a disk, the network. Exit code 3, as for every OSError."""


class ProcessError(Exception):
    """One of several processes ended the run: its line, and the exit code that it has by itself."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite. Raised before the update, so the weights are still good; exit code 1."""


class Note(str):
    """What an error's line ends with, said by whoever knows more than the one that raised it (`add_note`)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or else the list of what is known."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(options)}"
