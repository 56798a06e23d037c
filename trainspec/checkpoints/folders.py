"""The directories of checkpoints: their names, which of them are complete, what was left half written or set aside.

step-000050             complete: it has its final name
.step-000050.tmp        being written, or what a kill has left of it
.step-000050.old        complete, while another of the same step takes its place
.step-000050.gone       being removed
step-000050.damaged     not whole, and kept for whoever wants to look at it
latest, best            names that point at one of the complete
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LATEST, BEST = "latest", "best"
_COMPLETE = re.compile(r"step-(\d+)")
_ASIDE = re.compile(r"step-\d+\.damaged(-\d+)?")
_LEFTOVER = re.compile(rf"\.step-(?P<step>\d+)\.(?P<kind>tmp|old|gone(-\d+)?)|\.({LATEST}|{BEST})\.tmp")


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:06d}"


def checkpoints_of(out: Path) -> Path:
    """The directory that holds a run's checkpoints."""
    return out / "checkpoints"


def unfinished(out: Path, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    return checkpoints_of(out) / f".{checkpoint_name(step)}.tmp"


def step_of(path: Path) -> int | None:
    """The step that the name of a complete checkpoint says."""
    match = _COMPLETE.fullmatch(path.name)
    return int(match[1]) if match else None


def complete(out: Path) -> list[Path]:
    """The complete checkpoints under OUT, oldest first."""
    paths = [path for path in checkpoints_of(out).glob("step-*") if path.is_dir()]
    numbered = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return [path for _, path in sorted(numbered)]


def aside(out: Path) -> list[Path]:
    """The checkpoints under OUT that were set aside as damaged."""
    return sorted(path for path in checkpoints_of(out).glob("step-*") if _ASIDE.fullmatch(path.name))


def names_aside(out: Path) -> str:
    """Those of `aside`, as users are told them; empty where there is none."""
    return ", ".join(path.name for path in aside(out))


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint under OUT, if any."""
    paths = complete(out)
    return paths[-1] if paths else None


def commit(out: Path, step: int) -> Path:
    """Give a finished checkpoint its final name, by which it counts as complete."""
    path = checkpoints_of(out) / checkpoint_name(step)
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        unfinished(out, step).rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    return path


def put_back(out: Path) -> None:
    """Give checkpoints their names again of which a kill has left no other; remove those that others have replaced."""
    for path in checkpoints_of(out).glob(".step-*.old"):
        match = _LEFTOVER.fullmatch(path.name)
        final = path.with_name(checkpoint_name(int(match["step"]))) if match else path
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process has been faster
                path.rename(final)


def remove_leftovers(out: Path, *, before: int | None = None) -> None:
    """Remove what was left half written or half removed: by a run that was killed, or only of steps `before` one."""
    put_back(out)
    for path in checkpoints_of(out).glob(".*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (before is not None and not (match["step"] and int(match["step"]) < before)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a directory of a checkpoint: its name first, so that half of it never counts as complete.

    Whoever still writes into it writes into nothing.
    """
    name = path.name.removeprefix(".").removesuffix(".tmp")
    gone = _free(path.with_name(f".{name}.gone"))
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    except OSError:
        # A file system that cannot: nothing of an unfinished one counts, and no complete one has come to be.
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name by which it no longer counts. Returns its new place."""
    aside = _free(path.with_name(f"{path.name}.damaged"))
    path.rename(aside)
    flush(path.parent)
    return aside


def point(out: Path, name: str, target: Path | None) -> None:
    """Let `name` beside the checkpoints stand for one of them (None: for none).

    A symbolic link, or where the file system has none a text file with the checkpoint's name.
    """
    path = checkpoints_of(out) / name
    if target is None:
        _drop_copy(path)
        path.unlink(missing_ok=True)
        return
    new = path.with_name(f".{name}.tmp")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target.name, target_is_directory=True)
    except OSError:
        new.write_text(target.name + "\n", encoding="utf-8")
    _drop_copy(path)
    new.replace(path)


def is_pointed(out: Path, name: str) -> bool:
    """Whether `name` stands for a checkpoint, be it one that is gone."""
    path = checkpoints_of(out) / name
    return path.is_symlink() or path.exists()


def flush(path: Path) -> None:
    """Have a file or a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk that comes from inside names the file; the system names it only where it opens one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _drop_copy(path: Path) -> None:
    """Remove the directory that stands for a name where a run was copied by a tool that follows links."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _free(path: Path) -> Path:
    """`path`, or with a number where there is one already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
