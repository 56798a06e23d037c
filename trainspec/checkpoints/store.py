"""The store of a run's checkpoints: saved while the run goes on, complete or not at all.

Processes meet in the checkpoint's directory, not in a collective: each leaves its digests there when its files are on the
disk, and the leader waits for those of all before it writes the manifest and gives the directory its final name.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

from trainspec.checkpoints import folders, retention
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.manifest import PORTABLE, Manifest
from trainspec.checkpoints.notes import Written, leave, note, word_of
from trainspec.checkpoints.portable import metadata_of, write_shards
from trainspec.checkpoints.shards import KINDS, as_shards
from trainspec.checkpoints.wholeness import wrong_shards
from trainspec.errors import MachineError, WeightsError
from trainspec.recipe import Checkpoint as CheckpointSettings
from trainspec.recipe import Recipe
from trainspec.runs.contract import ArrayFormat, S
from trainspec.runs.identity import Identity
from trainspec.runs.processes import Processes

# How long a save that is given up has to remove what it has written.
_GIVING_UP_SECONDS = 2.0


@dataclass(frozen=True)
class SaveReport:
    """A save that has ended: how long the run waited for it, how long it took, the checkpoint's bytes, and its error if it failed.

    On processes other than the leader `size_bytes` are those of this process's files.
    """

    step: int
    blocking_seconds: float
    seconds: float
    size_bytes: int
    error: str | None = None


class CheckpointStore(Generic[S]):
    """Saves the states of one run, at most one at a time.

    `manifest` has what is the same in all of the run's checkpoints. A save that fails leaves nothing, and earlier checkpoints as
    they are. What the machine is to blame for (a full disk) stops the run or is only reported, as `checkpoint.on_failure`
    says: then `check`, `wait` and the next `save` raise MachineError, or do not. Any other error is always raised.
    """

    def __init__(
        self,
        out: Path,
        array_format: ArrayFormat[S],
        manifest: Manifest,
        settings: CheckpointSettings,
        processes: Processes,
    ) -> None:
        self._out, self._format, self._settings, self._processes = out, array_format, settings, processes
        self._manifest = replace(manifest, format=array_format.name)
        self._save: _Save | None = None
        self._begun: int | None = None
        self._reports: list[SaveReport] = []
        self._given_up = threading.Event()

    def save(self, state: S, *, heldout_loss: float | None = None) -> None:
        """Begin to save `state`; returns as soon as the state may change, with `checkpoint.asynchronous=false` when it is saved.

        Waits for an earlier save first. A state whose save was begun is not saved again.
        """
        if state.step == self._begun:
            return
        self.wait()
        began, self._begun = time.perf_counter(), state.step
        folder = folders.unfinished(self._out, state.step)
        manifest = replace(self._manifest, step=state.step, heldout_loss=heldout_loss)
        write = self._begin(folder, state)
        self._save = _Save(lambda: self._finish(write, folder, manifest), step=state.step, began=began)
        if not self._settings.asynchronous:
            self.wait()

    def load(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        return self._format.restore(state, path)

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait for one in flight."""
        if self._save is not None and self._save.is_done:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save in flight. Raises its error.

        What is not done after so many `seconds` is given up without an error: that is for a run that ends with one, as the
        processes that a save needs may be gone.
        """
        save = self._save
        if save is None:
            return
        began = time.perf_counter()
        try:
            save.join(seconds)
        finally:  # an interrupt leaves the save in flight
            save.blocking_seconds += time.perf_counter() - began
        if not save.is_done:
            self.give_up()
            save.join(_GIVING_UP_SECONDS)
            return
        self._save = None
        self._reports.append(save.report())
        if save.error is not None and not self._is_forgiven(save.error):
            raise save.error

    def failure(self) -> str | None:
        """The text of a failed save that has to stop the run, for the other processes; does not wait and does not raise.

        The error stays, and is raised by the next call.
        """
        if self._save is None or not self._save.is_done or self._save.error is None:
            return None
        return None if self._is_forgiven(self._save.error) else str(self._save.error)

    def report(self) -> list[SaveReport]:
        """The saves that have ended since this was asked last."""
        if self._save is not None and self._save.is_done and self.failure() is None:
            self.wait()
        reports, self._reports = self._reports, []
        return reports

    def give_up(self) -> None:
        """Let the save in flight fail instead of waiting for files of other processes: one of them is gone."""
        self._given_up.set()

    def _is_forgiven(self, error: BaseException) -> bool:
        return isinstance(error, MachineError) and self._settings.on_failure == "continue"

    def _begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Take the copy, in every process; what the disk does not allow is an error of the save, not of the copy."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return self._format.begin(folder, state)
        except OSError as error:
            failed = error

        def fail() -> dict[str, str]:
            raise failed

        return fail

    def _finish(self, write: Callable[[], dict[str, str]], folder: Path, manifest: Manifest) -> int:
        """Write this process's files; the leader then completes the checkpoint. Returns its bytes."""
        index = self._processes.index
        try:
            try:
                digests = write()
                sizes = {name: (folder / name).stat().st_size for name in digests}
                leave(folder, index, Written(digests, sizes))
                if self._processes.is_leader:
                    manifest = self._complete(folder, manifest)
                    sizes = manifest.sizes
            except OSError as error:
                raise _of_disk(error, folder, self._out) from error
        except BaseException as error:  # half a checkpoint would only fill the disk
            if self._processes.is_leader:
                folders.remove(folder)
            else:
                leave(folder, index, Written({}, {}, str(error), isinstance(error, MachineError)))
            raise
        if self._processes.is_leader:
            try:
                folders.remove_leftovers(self._out, before=manifest.step)
                retention.apply(self._out, self._settings)
            except OSError as error:
                name = folders.checkpoint_name(manifest.step)
                raise MachineError(
                    f"{_words(error)}; {name} is saved, but older ones were not removed"
                ) from error
        return sum(sizes.values())

    def _complete(self, folder: Path, manifest: Manifest) -> Manifest:
        """Wait for the files of all processes, and make a checkpoint of them. Returns its manifest."""
        count = self._processes.count
        words = [word_of(folder, process, count, self._given_up) for process in range(count)]
        manifest = replace(
            manifest,
            sha256={name: digest for word in words for name, digest in word.sha256.items()},
            sizes={name: size for word in words for name, size in word.sizes.items()},
        )
        if wrong := next(wrong_shards(folder, manifest), None):
            raise WeightsError(f"{wrong}; no checkpoint was written")
        manifest.write(folder)
        for process in range(count):
            note(folder, process).unlink()
        folders.flush(folder)
        folders.commit(self._out, manifest.step)
        return manifest


class _Save:
    """Work in a thread of its own, which does not keep the program from ending."""

    def __init__(self, work: Callable[[], int], *, step: int, began: float) -> None:
        self.error: BaseException | None = None
        self._step, self._began, self._ended, self._size_bytes = step, began, began, 0
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()
        self.blocking_seconds = time.perf_counter() - began

    def _run(self, work: Callable[[], int]) -> None:
        try:
            self._size_bytes = work()
        except BaseException as error:  # raised again in the main thread
            self.error = error
        self._ended = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end, or for so many seconds."""
        self._thread.join(seconds)

    def report(self) -> SaveReport:
        """What it was, after its end."""
        seconds = self._ended - self._began
        text = None if self.error is None else str(self.error)
        return SaveReport(self._step, self.blocking_seconds, seconds, self._size_bytes, text)


def _of_disk(error: OSError, folder: Path, out: Path) -> MachineError:
    """An error of a save as one line, with the way out."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            way_out = "make room there, keep fewer (checkpoint.keep), or give another --out"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            way_out = "make it writable, or give another --out"
        case errno.ENOENT:
            way_out = "another process has given it up, or somebody has removed it"
        case errno.ENOSYS | errno.EOPNOTSUPP | errno.EXDEV | errno.EINVAL:
            way_out = "the file system cannot do this; give an --out on another"
        case _:
            way_out = "the disk or its connection failed; give an --out on another if it does again"
    whole = folders.latest(out)
    kept = f"the newest checkpoint is {whole.name}" if whole else "there is no earlier one"
    name = folder.name.removeprefix(".").removesuffix(".tmp")
    return MachineError(f"{_words(error)}: {name} was not saved; {kept}; {way_out}")


def _words(error: OSError) -> str:
    """The files of an error and what the system says of it."""
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    return ": ".join(filter(None, (files, error.strerror or str(error))))


class _WholeArrays:
    """A format for arrays that one process has whole in memory."""

    name = PORTABLE

    def __init__(self, recipe: Recipe, identity: Identity | None) -> None:
        self._recipe, self._identity = recipe, identity

    def begin(self, folder: Path, state: Checkpoint) -> Callable[[], dict[str, str]]:
        shards = [
            s for kind in KINDS for s in as_shards(kind, {n: w[...] for n, w in getattr(state, kind).items()})
        ]
        metadata = metadata_of(state.step, self._recipe, self._identity)
        return lambda: write_shards(folder, shards, Processes(), metadata=metadata)

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
    store = CheckpointStore(out, _WholeArrays(recipe, identity), manifest, recipe.checkpoint, Processes())
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
