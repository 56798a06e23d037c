"""What ended a command, in one line and an exit code; of a run that was training, also what of it is saved.

Errors of the frameworks are known by their names and words: nothing of a framework is imported here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainspec.errors import (
    EXIT_CRASHED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MACHINE,
    EXIT_USER_ERROR,
    MachineError,
    NonFiniteLossError,
    Note,
    ProcessError,
    UserError,
)
from trainspec.plans.accelerators import Devices
from trainspec.recipe import Recipe
from trainspec.runs import checkpoint, memory

# Classes of torch for what a device, its driver or the network did. JAX has one class for everything: its text begins
# with a status.
_DEVICE_CLASSES = {"AcceleratorError", "DistError"}
_XLA_STATUS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|DATA_LOSS|CANCELLED):")
# What a plain RuntimeError says of them.
_DEVICE_WORDS = re.compile(
    r"CUDA(_ERROR_\w+| error)|CU(DNN|BLAS)_STATUS|NVIDIA driver|\bNCCL\b|\bgloo\b|[Ss]ocket (closed|timeout)"
    r"|[Cc]onnection (closed|reset|refused|timed out)|Broken pipe",
)
# An index out of bounds in a kernel: the device did as it was told.
_NOT_ITS_FAULT = "device-side assert"
# After these words come pages of C++; what XLA says may be long without them.
_STACK = re.compile(r"\s*(Exception raised from|C\+\+ CapturedTraceback|For debugging consider).*", re.DOTALL)
_LONGEST_CHARACTERS = 1000
NOTHING_SAVED = Note("nothing was saved yet")


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code that an error ends a command with, and its line, but for its notes."""
    match error:
        case UserError():
            code, text = EXIT_USER_ERROR, str(error)
        case ProcessError():
            code, text = error.code, str(error)
        case NonFiniteLossError():
            code, text = EXIT_FAILED, f"stopped before the update: {error}"
        case OSError(errno=errno.ENAMETOOLONG):  # whoever wrote the name has to mend it
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
    """Text of any kind as one line of a bounded length; what a terminal would not show is written out."""
    line = " ".join(text.split())
    if len(line) > 2 * _LONGEST_CHARACTERS:  # its end may have the way out
        line = f"{line[: _LONGEST_CHARACTERS - 100]} ... {line[-_LONGEST_CHARACTERS + 500 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def notes_of(error: BaseException) -> list[Note]:
    """What its line ends with; libraries have notes of their own, for whoever reads the stack."""
    return [note for note in getattr(error, "__notes__", ()) if isinstance(note, Note)]


def _of_machine(error: BaseException) -> str | None:
    """The words of an error of memory, a disk, a device, a driver or the network; None where it is none of these."""
    if isinstance(error, MachineError):
        return str(error)
    if lack := memory.memory_shortage(error):
        return memory.describe_shortage(lack)
    if isinstance(error, OSError):
        return describe_os_error(error)
    text, names = str(error), {kind.__name__ for kind in type(error).__mro__}
    known = names & _DEVICE_CLASSES or _XLA_STATUS.match(text) or _DEVICE_WORDS.search(text)
    return text if isinstance(error, RuntimeError) and known and _NOT_ITS_FAULT not in text else None


def describe_os_error(error: OSError) -> str:
    """Which file, where it is known, and the system's own words; of an error that carries only text, the text."""
    if error.strerror is None:
        return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    names = (error.filename, error.filename2)
    files = " -> ".join(os.fsdecode(n) for n in names if isinstance(n, str | bytes | os.PathLike))
    return f"{files}: {error.strerror}" if files else error.strerror


@contextmanager
def explained(recipe: Recipe, devices: Callable[[], Devices], *, out: Path | None = None) -> Iterator[None]:
    """An error inside says, where memory was the matter, what helps, and, where `out` is given, what a run has saved there.

    A user's mistake that was found before anything was trained is told as it is.
    """
    before = _newest(out)
    try:
        yield
    except BaseException as error:
        told = error
        if lack := memory.memory_shortage(error):
            told = MachineError(memory.describe_shortage(lack, devices=devices(), recipe=recipe))
        if out is not None and (outcome(error)[0] != EXIT_USER_ERROR or _newest(out) != before):
            told.add_note(saved_in(out))
        if told is error:
            raise
        raise told from error


def saved_in(out: Path) -> Note:
    """What a run that ends here has left, and how to go on."""
    try:
        newest = _newest(out)
    except OSError as error:
        return Note(f"what is saved in {out} cannot be read ({describe_os_error(error)})")
    return Note(f"saved: {newest}; continue with --resume") if newest else NOTHING_SAVED


def _newest(out: Path | None) -> Path | None:
    return checkpoint.latest(out) if out is not None else None
