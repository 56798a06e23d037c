"""The store of a run's checkpoints: saved while the run goes on, complete or not at all.

Processes meet in the checkpoint's directory, not in a collective: each leaves its digests there when its files are on the
disk, and the leader waits for those of all before it writes the manifest and gives the directory its final name.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Generic

from trainspec.checkpoints import folders, retention
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.manifest import Manifest
from trainspec.checkpoints.notes import Written, leave, note, word_of
from trainspec.checkpoints.states import ArrayFormat, S
from trainspec.checkpoints.wholeness import wrong_shards
from trainspec.errors import MachineError, WeightsError, describe_os_error
from trainspec.files.digests import PART_BYTES
from trainspec.recipe import Checkpoint as CheckpointSettings
from trainspec.recipe import Recipe
from trainspec.runs.processes import Processes

# How long a save that is given up has to remove what it has written.
_GIVING_UP_SECONDS = 2.0


class _OldKept(MachineError):
    """A checkpoint is saved, and older ones that it was to replace are there still."""


class CheckpointStore(Generic[S]):
    """Saves the states of one run, at most one at a time.

    `manifest` has what is the same in all of the run's checkpoints. A save that fails leaves nothing, and earlier checkpoints as
    they are. What the machine is to blame for (a full disk) stops the run or is only reported, as `checkpoint.on_failure`
    says: then `check`, `wait` and the next `save` raise MachineError, or `forgiven` has its text. Any other error is always
    raised. An error is that of one process: all have to agree (`runs.agreement`) before any of them calls what raises it, as
    to begin a save is a collective.
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
        self._failed: BaseException | None = None
        self._forgiven: list[str] = []
        self._given_up = threading.Event()

    @property
    def is_asynchronous(self) -> bool:
        """Whether the run is to go on while a save is in flight."""
        return self._settings.asynchronous

    def prepare(self, state: S) -> None:
        """Begin what saves of states like this one need, beside the updates, so that the first need not wait for it."""
        self._format.prepare(state)

    def save(self, state: S, *, heldout_loss: float | None = None) -> None:
        """Begin to save `state`; returns as soon as the state may change. A collective.

        Waits for an earlier save first. A state whose save was begun is not saved again.
        """
        if state.step == self._begun:
            return
        self.wait()
        self._begun, self._failed = state.step, None
        folder = folders.unfinished(self._out, state.step)
        manifest = replace(self._manifest, step=state.step, heldout_loss=heldout_loss)
        write = self._begin(folder, state)
        self._save = _Save(lambda: self._finish(write, folder, manifest))

    def load(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        return self._format.restore(state, path)

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait for one in flight."""
        if self._save is not None and self._save.is_done:
            self.wait()

    def wait(self, seconds: float | None = None, *, is_last: bool = False) -> None:
        """Wait for the save in flight. Raises its error.

        `is_last`: nothing goes on afterwards, so that a newest state that was not saved is an error whatever
        `checkpoint.on_failure` says. What is not done after so many `seconds` is given up, with an error: the processes that
        it needs may be gone.
        """
        save = self._save
        if save is not None:
            save.join(seconds)
            if not save.is_done:
                self._given_up.set()
                save.join(_GIVING_UP_SECONDS)
            if not save.is_done:
                name = folders.checkpoint_name(self._begun or 0)
                raise MachineError(f"{name} was not saved: it waits for other processes, which may be gone")
            self._save, self._failed = None, save.error
        error = self._failed
        if error is None:
            return
        if not self._is_forgiven(error) or (is_last and not isinstance(error, _OldKept)):
            self._failed = None
            raise error
        if save is not None:
            self._forgiven.append(str(error))

    def failure(self) -> str | None:
        """The text of a failed save that has to stop the run, for the other processes; does not wait and does not raise.

        The error stays, and is raised by the next call.
        """
        if self._save is None or not self._save.is_done or self._save.error is None:
            return None
        return None if self._is_forgiven(self._save.error) else str(self._save.error)

    def forgiven(self) -> list[str]:
        """The errors since this was asked last that the run goes on in spite of."""
        if self._save is not None and self._save.is_done and self.failure() is None:
            self.wait()
        lines, self._forgiven = self._forgiven, []
        return lines

    def _is_forgiven(self, error: BaseException) -> bool:
        return isinstance(error, MachineError) and self._settings.on_failure == "continue"

    def _begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Take the copy, in every process, or in none: a format may need the others to begin.

        What the disk does not allow is an error of the save, not of the copy.
        """
        failed: Exception | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failed = error
        words = self._processes.exchange("" if failed is None else str(_of_disk(failed, folder, self._out)))
        for process, word in enumerate(words):
            if word and failed is None:
                failed = MachineError(f"process {process} of {len(words)}: {word}")
        if failed is None:
            try:
                return self._format.begin(folder, state)
            except OSError as error:
                failed = error

        def fail(failed: Exception = failed) -> dict[str, str]:
            raise failed

        return fail

    def _finish(self, write: Callable[[], dict[str, str]], folder: Path, manifest: Manifest) -> None:
        """Write this process's files; the leader then completes the checkpoint."""
        index = self._processes.index
        try:
            try:
                digests = write()
                sizes = {name: (folder / name).stat().st_size for name in digests}
                leave(folder, index, Written(digests, sizes))
                if self._processes.is_leader:
                    self._complete(folder, manifest)
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
                raise _OldKept(
                    f"{describe_os_error(error)}; {name} is saved, but older ones were not removed"
                ) from error

    def _complete(self, folder: Path, manifest: Manifest) -> None:
        """Wait for the files of all processes, and make a checkpoint of them."""
        count = self._processes.count
        words = [word_of(folder, process, count, self._given_up) for process in range(count)]
        manifest = replace(
            manifest,
            digests={name: digest for word in words for name, digest in word.digests.items()},
            sizes={name: size for word in words for name, size in word.sizes.items()},
        )
        if wrong := next(wrong_shards(folder, manifest), None):
            raise WeightsError(f"{wrong}; no checkpoint was written")
        manifest.write(folder)
        for process in range(count):
            note(folder, process).unlink()
        folders.flush(folder)
        folders.commit(self._out, manifest.step)


class _Save:
    """Work in a thread of its own, which does not keep the program from ending."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again in the main thread
            self.error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end, or for so many seconds."""
        self._thread.join(seconds)


def _of_disk(error: OSError, folder: Path, out: Path) -> MachineError:
    """An error of a save as one line, with the way out."""
    match error.errno:
        case None:  # not the system's: a format has waited for another process in vain
            way_out = "another process may be gone"
        case errno.ENOSPC | errno.EDQUOT:
            way_out = "make room there, such as by removing an older checkpoint, or give another --out"
        case errno.EFBIG:
            way_out = "raise the limit for a file (ulimit -f), or give an --out on another file system"
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
    return MachineError(f"{describe_os_error(error)}: {name} was not saved; {kept}; {way_out}")


def manifest_of(recipe: Recipe, identity: Identity | None, shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    """What the manifests of all checkpoints of a run have in common."""
    return Manifest(
        step=0,
        recipe=recipe.model_dump(mode="json", by_alias=True),
        digests={},
        identity=identity,
        shapes=shapes,
        part_bytes=PART_BYTES,
    )
