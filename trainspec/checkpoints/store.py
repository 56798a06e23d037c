"""The store of a run's checkpoints: saved while the run goes on, complete or not at all.

Processes meet in the checkpoint's directory, not in a collective: each leaves its digests there when its files are on the
disk, and the leader waits for those of all before it writes the manifest and gives the directory its final name.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from trainspec.checkpoints import folders
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.manifest import PORTABLE, Manifest
from trainspec.checkpoints.portable import write_shards
from trainspec.checkpoints.retention import remove_old
from trainspec.checkpoints.shards import KINDS, ShardFiles, files_of, whole
from trainspec.errors import MachineError, WeightsError
from trainspec.recipe import Checkpoint as CheckpointSettings
from trainspec.recipe import Recipe
from trainspec.runs.contract import S
from trainspec.runs.identity import Identity
from trainspec.runs.processes import Processes

_POLL_SECONDS = 0.02
# How long the leader waits for the files of the other processes after its own are written.
_PATIENCE_SECONDS = 1800.0
State = TypeVar("State")


class ArrayFormat(Protocol[State]):
    """How the arrays of a state become files, and files arrays."""

    name: str

    def begin(self, folder: Path, state: State) -> Callable[[], dict[str, str]]:
        """Take a copy of what this process saves of `state`, which may change as soon as this returns.

        The function that is returned writes it into `folder`, in another thread, and returns the SHA-256 of each file by its
        path there.
        """
        ...

    def restore(self, state: State, path: Path) -> State:
        """`state` as it was when the checkpoint at `path` was taken."""
        ...


class CheckpointStore(Generic[S]):
    """Saves the states of one run, at most one at a time.

    `manifest` has what is the same in all of the run's checkpoints. An error of a save is raised by the next call.
    """

    def __init__(
        self,
        out: Path,
        array_format: ArrayFormat[S],
        manifest: Manifest,
        settings: CheckpointSettings,
        processes: Processes,
    ) -> None:
        self._out, self._format, self._manifest = (
            out,
            array_format,
            replace(manifest, format=array_format.name),
        )
        self._settings, self._processes = settings, processes
        self._save: _Save | None = None

    def save(self, state: S, *, heldout_loss: float | None = None) -> None:
        """Begin to save `state`; returns as soon as the state may change. Waits for an earlier save first."""
        self.wait()
        folder = folders.unfinished(self._out, state.step)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = replace(self._manifest, step=state.step, heldout_loss=heldout_loss)
        write = self._format.begin(folder, state)
        self._save = _Save(lambda: self._finish(write, folder, manifest))

    def load(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        return self._format.restore(state, path)

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait for one in flight."""
        if self._save is not None and self._save.is_done:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save in flight, for at most that many seconds. Raises its error."""
        save, self._save = self._save, None
        if save is not None:
            save.result(seconds)

    def _finish(self, write: Callable[[], dict[str, str]], folder: Path, manifest: Manifest) -> None:
        index, count = self._processes.index, self._processes.count
        try:
            digests = write()
        except BaseException as error:
            _leave(folder, index, error=str(error))
            if self._processes.is_leader:
                folders.discard(folder)
            raise
        _leave(folder, index, digests=digests)
        if not self._processes.is_leader:
            return
        try:
            manifest = replace(manifest, sha256=_collected(folder, count))
            _check_whole(folder, manifest)
            manifest.write(folder)
            for process in range(count):
                _note(folder, process).unlink()
            folders.flush(folder)
            folders.commit(self._out, manifest.step)
        except BaseException:  # half a checkpoint would only fill the disk
            folders.discard(folder)
            raise
        remove_old(self._out, self._settings)


class _Save:
    """Work in a thread of its own, which does not keep the program from ending."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again in the main thread
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, seconds: float | None = None) -> None:
        """Wait for the end, for at most that many seconds. Raises the error of the work."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _Written:
    """What a process leaves in the directory when it has written its files, or could not."""

    sha256: Mapping[str, str]
    error: str | None


def _note(folder: Path, process: int) -> Path:
    return folder / f"process-{process:05d}.json"


def _leave(
    folder: Path, process: int, *, digests: Mapping[str, str] | None = None, error: str | None = None
) -> None:
    """Leave word of this process's files, by a rename: a reader sees all of it or nothing."""
    path = _note(folder, process)
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_text(json.dumps({"sha256": dict(digests or {}), "error": error}), encoding="utf-8")
        unfinished.rename(path)
    except OSError:
        if error is None:
            raise


def _collected(folder: Path, count: int) -> dict[str, str]:
    """The digests of the files of all processes. Raises MachineError where one could not write, or does not come."""
    digests: dict[str, str] = {}
    until = time.monotonic() + _PATIENCE_SECONDS
    for process in range(count):
        path = _note(folder, process)
        while not path.exists():
            if time.monotonic() > until:
                raise MachineError(f"{folder}: process {process} of {count} has not written its files")
            time.sleep(_POLL_SECONDS)
        word = json.loads(path.read_text(encoding="utf-8"))
        if word["error"] is not None:
            raise MachineError(f"process {process} of {count} could not write its files: {word['error']}")
        digests |= word["sha256"]
    return digests


def _check_whole(folder: Path, manifest: Manifest) -> None:
    """Raises WeightsError unless the files have every element of every tensor exactly once."""
    if manifest.format != PORTABLE or manifest.shapes is None:
        return
    for kind in KINDS:
        files = [folder / name for name in files_of(kind, manifest.sha256)]
        try:
            tensors = ShardFiles(files, manifest.shapes, where=folder)
        except WeightsError as error:
            raise WeightsError(f"{error}; no checkpoint was written") from None
        absent = next((name for name in manifest.shapes if name not in tensors.shapes), None)
        if absent is not None:
            raise WeightsError(
                f"{folder}: no process has written {kind} of {absent}; no checkpoint was written"
            )


class _WholeArrays:
    """A format for arrays that one process has whole in memory."""

    name = PORTABLE

    def begin(self, folder: Path, state: Checkpoint) -> Callable[[], dict[str, str]]:
        shards = [
            s for kind in KINDS for s in whole(kind, {n: w[...] for n, w in getattr(state, kind).items()})
        ]
        return lambda: write_shards(folder, shards, Processes())

    def restore(self, state: Checkpoint, path: Path) -> Checkpoint:
        raise AssertionError(f"{path} is read with `load`")


def save_checkpoint(
    out: Path, checkpoint: Checkpoint, *, recipe: Recipe, identity: Identity | None = None
) -> Path:
    """Save arrays that this process has whole, and wait for it. Returns the checkpoint's directory.

    Without `identity` a run that resumes from it is compared by its recipe only. Raises WeightsError, with earlier
    checkpoints untouched, where a tensor is not finite or a moment does not have its weight's shape.
    """
    manifest = manifest_of(recipe, identity, {name: w.shape for name, w in checkpoint.weights.items()})
    store = CheckpointStore(out, _WholeArrays(), manifest, recipe.checkpoint, Processes())
    store.save(checkpoint)
    store.wait()
    return folders.checkpoints_of(out) / folders.checkpoint_name(checkpoint.step)


def manifest_of(recipe: Recipe, identity: Identity | None, shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    """What the manifests of all checkpoints of a run have in common."""
    return Manifest(
        step=0,
        recipe=recipe.model_dump(mode="json", by_alias=True),
        sha256={},
        identity=identity,
        shapes=shapes,
    )
