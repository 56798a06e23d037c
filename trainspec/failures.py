"""Any error as one line and an exit code; for a training run, also what it has saved.

Errors of the frameworks are recognised by class name and text: no framework is imported here.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainspec.checkpoints import folders
from trainspec.errors import (
    EXIT_CRASHED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MACHINE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    MachineError,
    NonFiniteLossError,
    Note,
    ProcessError,
    StoppedError,
    UserError,
    describe_os_error,
)
from trainspec.plans.accelerators import Devices
from trainspec.runs import memory
from trainspec.runs.run import Run

# torch's classes for failures of a device, its driver or the network. JAX has one class for everything, whose text begins
# with a status.
_DEVICE_CLASSES = {"AcceleratorError", "DistError"}
_XLA_STATUS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|DATA_LOSS|CANCELLED):")
# How a plain RuntimeError describes them.
_DEVICE_WORDS = re.compile(
    r"CUDA(_ERROR_\w+| error)|CU(DNN|BLAS)_STATUS|NVIDIA driver|\bNCCL\b|\bgloo\b|[Ss]ocket (closed|timeout)"
    r"|[Cc]onnection (closed|reset|refused|timed out)|Broken pipe",
)
# XLA's text of a collective that has failed at its dispatch, a ValueError.
_XLA_COLLECTIVE = re.compile(r"[A-Z_]+: Gloo \w+ failed")
# An index out of bounds in a kernel: a mistake of the program, not of the device.
_NOT_ITS_FAULT = "device-side assert"
# Pages of C++ follow these words; XLA's messages may be long without them.
_STACK = re.compile(r"\s*(Exception raised from|C\+\+ CapturedTraceback|For debugging consider).*", re.DOTALL)
_LONGEST_CHARACTERS = 1000
NOTHING_SAVED = Note("nothing was saved yet")
NOTHING_WHOLE = Note("nothing that was saved is whole")
_SAVED = re.compile(
    r"; (?:nothing was saved yet|nothing that was saved is whole|saved: \S.*; continue with --resume)$"
)


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error, without its notes."""
    match error:
        case UserError():
            code, text = EXIT_USER_ERROR, str(error)
        case ProcessError():
            code, text = error.code, str(error)
        case NonFiniteLossError():
            code, text = EXIT_FAILED, f"stopped before the update: {error}"
        case StoppedError():
            code, text = EXIT_STOPPED, str(error)
        case OSError(errno=errno.ENAMETOOLONG):  # a name that the user wrote
            code, text = EXIT_USER_ERROR, f"{error.filename!s:.200}...: {error.strerror}"
        case KeyboardInterrupt():
            code, text = EXIT_INTERRUPTED, "interrupted"
        case _ if (words := _of_machine(error)) is not None:
            code, text = EXIT_MACHINE, words
        case _:
            code, text = EXIT_CRASHED, ": ".join(filter(None, (type(error).__name__, str(error))))
    if code in (EXIT_MACHINE, EXIT_CRASHED):
        text = _STACK.sub("", text)[:_LONGEST_CHARACTERS]
    return code, _one_line(text)


def _one_line(text: str) -> str:
    """Any text as one line of bounded length; characters that a terminal would not show are escaped."""
    line = " ".join(text.split())
    if len(line) > 2 * _LONGEST_CHARACTERS:  # the way out may be at its end
        line = f"{line[: _LONGEST_CHARACTERS - 100]} ... {line[-_LONGEST_CHARACTERS + 500 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def notes_of(error: BaseException) -> list[Note]:
    """Our notes of an error, which end its line; libraries add notes of their own for the stack."""
    return [note for note in getattr(error, "__notes__", ()) if isinstance(note, Note)]


def _of_machine(error: BaseException) -> str | None:
    """The message of an error of memory, a disk, a device, a driver or the network; None for any other error."""
    if isinstance(error, MachineError):
        return str(error)
    if lack := memory.memory_shortage(error):
        return memory.describe_shortage(lack)
    if isinstance(error, OSError):
        return describe_os_error(error)
    text, names = str(error), {kind.__name__ for kind in type(error).__mro__}
    known = names & _DEVICE_CLASSES or _XLA_STATUS.match(text) or _DEVICE_WORDS.search(text)
    if isinstance(error, ValueError) and _XLA_COLLECTIVE.match(text):
        return text
    return text if isinstance(error, RuntimeError) and known and _NOT_ITS_FAULT not in text else None


@contextmanager
def explained(run: Run, devices: Callable[[], Devices], *, out: Path | None = None) -> Iterator[None]:
    """Errors raised inside say what helps when memory ran out and, where `out` is given, what the run has saved there.

    A user's mistake that is found before training starts stays as it is.
    """
    before = _newest(out)
    try:
        yield
    except BaseException as error:
        told = error
        if lack := memory.memory_shortage(error):
            told = MachineError(memory.describe_shortage(lack, devices=devices(), run=run))
        if out is not None and (outcome(error)[0] != EXIT_USER_ERROR or _newest(out) != before):
            told.add_note(saved_in(out))
        if told is error:
            raise
        raise told from error


def saved_in(out: Path) -> Note:
    """What the run has saved so far, and how to continue it."""
    try:
        newest = _newest(out)
        nothing = NOTHING_WHOLE if folders.aside(out) else NOTHING_SAVED
    except OSError as error:
        return Note(f"what is saved in {out} cannot be read ({describe_os_error(error)})")
    return Note(f"saved: {newest}; continue with --resume") if newest else nothing


def without_saved(line: str) -> str:
    """An error's line without what `saved_in` adds."""
    return _SAVED.sub("", line)


def _newest(out: Path | None) -> Path | None:
    return folders.latest(out) if out is not None else None
