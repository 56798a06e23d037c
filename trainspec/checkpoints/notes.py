"""How the processes of a save tell each other what they have written: by files in its directory, not by a collective."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trainspec.checkpoints.folders import naming
from trainspec.errors import MachineError, WeightsError

_POLL_SECONDS = 0.02
# How long the leader waits for the files of the other processes after its own are written.
_PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Written:
    """What a process leaves in the directory when it has written its files, or could not: then `error` says why."""

    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    error: str | None = None
    is_of_machine: bool = False


def note(folder: Path, process: int) -> Path:
    """The file of a process's word."""
    return folder / f"process-{process:05d}.json"


def leave(folder: Path, process: int, word: Written) -> None:
    """Leave word of this process's files, by a rename: a reader sees all of it or nothing."""
    path = note(folder, process)
    unfinished = path.with_suffix(".tmp")
    try:
        with naming(unfinished):
            unfinished.write_text(json.dumps(asdict(word)), encoding="utf-8")
        unfinished.rename(path)
    except OSError:
        if word.error is None:
            raise


def word_of(folder: Path, process: int, count: int, given_up: threading.Event) -> Written:
    """The word of one process. Raises what kept it from writing, and MachineError where it does not come."""
    path, until = note(folder, process), time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > until or given_up.is_set():
            raise MachineError(
                f"{folder}: process {process} of {count} has not written its files; all processes need the same --out, on a "
                "file system that they share"
            )
        given_up.wait(_POLL_SECONDS)
    word = Written(**json.loads(path.read_text(encoding="utf-8")))
    if word.error is not None:
        kind = MachineError if word.is_of_machine else WeightsError
        raise kind(f"process {process} of {count}: {word.error}")
    return word
