"""The directories of checkpoints: their names, which of them are complete, and which was left half written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_COMPLETE = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"\.step-\d+\.(tmp|old)")


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:06d}"


def checkpoints_of(out: Path) -> Path:
    """The directory that holds a run's checkpoints."""
    return out / "checkpoints"


def unfinished(out: Path, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    return checkpoints_of(out) / f".{checkpoint_name(step)}.tmp"


def complete(out: Path) -> list[Path]:
    """The complete checkpoints under OUT, oldest first."""
    numbered = [(_COMPLETE.fullmatch(p.name), p) for p in checkpoints_of(out).glob("step-*") if p.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint under OUT, if any."""
    paths = complete(out)
    return paths[-1] if paths else None


def commit(out: Path, step: int) -> Path:
    """Give a finished checkpoint its final name, by which it counts as complete."""
    path = checkpoints_of(out) / checkpoint_name(step)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    unfinished(out, step).rename(path)
    flush(path.parent)
    return path


def remove_leftovers(out: Path) -> None:
    """Remove what a run that was killed has left half written."""
    for path in checkpoints_of(out).glob(".step-*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a checkpoint that could not be finished."""
    shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file or a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
