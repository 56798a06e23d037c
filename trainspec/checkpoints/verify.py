"""Whether a checkpoint is whole: every file is there and the one that was written, and nothing lacks. Processes share the work.

What is not whole is set aside under a name by which it does not count, and kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainspec.checkpoints import folders, retention
from trainspec.checkpoints.manifest import (
    FILE,
    PORTABLE,
    DamagedError,
    Manifest,
    read_manifest,
    run_metadata,
)
from trainspec.checkpoints.wholeness import wrong_shards
from trainspec.cores import cores
from trainspec.errors import MachineError, RecipeError, WeightsError, describe_os_error
from trainspec.files.digests import algorithm_of, digest_of
from trainspec.files.tensors import TensorFile
from trainspec.runs.processes import Processes

# Hashing one file takes a core; more than a few at a time would wait for the disk.
_MOST_THREADS = 4
# What was found whole in this process, with size and time of every file: a run verifies what it resumes from once.
_whole: set[tuple[object, ...]] = set()


def verify(path: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Raises DamagedError unless every file of the checkpoint is the one that was written."""
    found = damages(path, share=share)
    if found:
        raise DamagedError(path, _in_one_line(found))


def verify_together(path: Path, processes: Processes) -> None:
    """`verify` by all processes: each reads its share, and it raises in all of them. A collective."""
    if found := _found_together(path, processes):
        raise DamagedError(path, _in_one_line(found))
    _remember(path, read_manifest(path))


def damages(path: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is damaged or missing in a checkpoint, a line for each file; of every `share[1]` files the `share[0]`-th is read.

    Who reads all of them looks as well whether they are all that there has to be. Files that this process has found whole
    before are not read again unless they have changed. Raises RecipeError where what made the digests is not installed.
    """
    try:
        manifest = read_manifest(path)
    except DamagedError as error:
        return [error.damage]
    named = folders.step_of(path)
    if named is not None and named != manifest.step:
        return [f"{path / FILE}: is that of step {manifest.step}"]
    index, count = share
    names = sorted(manifest.digests)[index::count]
    if _stamp(path, manifest) in _whole:
        return []
    with ThreadPoolExecutor(min(_MOST_THREADS, cores())) as pool:
        try:
            found = [line for line in pool.map(lambda name: _damage(path, name, manifest), names) if line]
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
    if not found and count == 1:
        found = list(wrong_shards(path, manifest))
        if not found:
            _remember(path, manifest)
    return found


def newest_whole(
    out: Path, processes: Processes, say: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The newest checkpoint under OUT that is whole; damaged ones that are newer get names by which they do not count.

    Each of these is a line that `say` is given as soon as it has its new name, in every process. A collective: each process
    reads its share, and all of them decide alike. Raises MachineError in all of them where one cannot read, or where a
    damaged one keeps its name: it would count as the newest of those that the run saves.
    """
    names = [path.name for path in folders.complete(out)]
    for name in reversed(_of_leader(names, processes)):
        path = folders.checkpoints_of(out) / name
        found = _found_together(path, processes)
        if not found:
            _remember(path, read_manifest(path))
            return path
        line, *failed = _of_leader(_set_aside(out, path, found) if processes.is_leader else [], processes)
        if failed:
            raise MachineError(line)
        say(line)
    return None


def _set_aside(out: Path, path: Path, found: list[str]) -> list[str]:
    """Give a damaged checkpoint another name. Returns what the user is told, and where that failed also why."""
    damage = _in_one_line(found)
    try:
        aside = folders.set_aside(path)
        retention.point_again(out)
    except OSError as error:
        why = error.strerror or str(error)
        return [
            f"{damage}; it cannot be set aside ({why}): make {path.parent} writable, or remove {path.name}",
            why,
        ]
    return [f"{damage}; not used, and set aside as {aside.name}"]


def _in_one_line(found: list[str]) -> str:
    return f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else found[0]


def _of_leader(words: list[str], processes: Processes) -> list[str]:
    """The leader's words, in every process."""
    return list(json.loads(processes.exchange(json.dumps(words))[0]))


def _exchanged(work: Callable[[], list[str]], processes: Processes) -> list[str]:
    """What all processes find together. Raises MachineError, or RecipeError, in all where one of them does."""
    try:
        mine: dict[str, object] = {"found": work()}
    except OSError as error:
        mine = {"failed": describe_os_error(error)}
    except RecipeError as error:
        mine = {"refused": str(error)}
    words = [json.loads(word) for word in processes.exchange(json.dumps(mine))]
    for index, word in enumerate(words):
        who = f"process {index} of {processes.count}"
        if "failed" in word:
            raise MachineError(f"{who} cannot read a checkpoint: {word['failed']}")
        if "refused" in word:
            raise RecipeError(word["refused"] if processes.count == 1 else f"{who}: {word['refused']}")
    return list(dict.fromkeys(line for word in words for line in word["found"]))


def _found_together(path: Path, processes: Processes) -> list[str]:
    """`damages`, in all processes alike: each reads its share of the files, then the leader looks at them as a whole."""
    found = _exchanged(lambda: damages(path, share=(processes.index, processes.count)), processes)
    if found or processes.count == 1:
        return found
    return _exchanged(
        lambda: list(wrong_shards(path, read_manifest(path))) if processes.is_leader else [], processes
    )


def _damage(path: Path, name: str, manifest: Manifest) -> str | None:
    """What is wrong with one file, if anything."""
    file, size = path / name, manifest.sizes.get(name)
    try:
        with file.open("rb") as stream:
            found = os.fstat(stream.fileno()).st_size
            if size is not None and found != size:
                lack = "empty" if not found else f"{found} bytes"
                return f"{file}: damaged ({lack} instead of {size} bytes{_another(file, name, manifest)})"
            recorded = manifest.digests[name]
            if digest_of(stream, manifest.part_bytes, algorithm_of(recorded)) == recorded:
                return None
    except FileNotFoundError:
        return f"{file}: missing (incomplete checkpoint)"
    return f"{file}: damaged (its digest is not the recorded one{_another(file, name, manifest)})"


def _another(file: Path, name: str, manifest: Manifest) -> str:
    """Which file it is instead, where it says so itself."""
    if manifest.format != PORTABLE:
        return ""
    try:
        told = TensorFile(file).metadata
    except WeightsError:
        return ""
    known = run_metadata(manifest.recipe, manifest.identity)
    if any(told.get(key, digest) != digest for key, digest in known.items()):
        return ": it is of another run"
    if told.get("step", str(manifest.step)) != str(manifest.step):
        return f": it is of step {told['step']}"
    return f": it is {told['file']}" if told.get("file", name) != name else ""


def _remember(path: Path, manifest: Manifest) -> None:
    if stamp := _stamp(path, manifest):
        _whole.add(stamp)


def _stamp(path: Path, manifest: Manifest) -> tuple[object, ...] | None:
    """What changes when one of the files does; None where one is missing."""
    try:
        stats = [(path / name).stat() for name in [FILE, *sorted(manifest.digests)]]
    except OSError:
        return None
    return (path.absolute(), *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
