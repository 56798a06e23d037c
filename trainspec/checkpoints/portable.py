"""The portable format: every process writes its shards as safetensors files, and any backend and plan reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from trainspec.checkpoints.checkpoint import load
from trainspec.checkpoints.copies import Copies
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.manifest import run_metadata
from trainspec.checkpoints.shards import KINDS, ArrayKind, Shard, file_name
from trainspec.checkpoints.states import S, States
from trainspec.errors import WeightsError
from trainspec.files.tensors import write_tensors
from trainspec.recipe import Recipe
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run

# Elements that are looked at at a time.
_PIECE = 2**17


class PortableFormat(Generic[S]):
    """Writes what `shards_of` gives and reads it back."""

    name = "portable"

    def __init__(
        self,
        backend: States[S],
        run: Run,
        processes: Processes,
        *,
        identity: Identity | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._backend, self._run, self._processes, self._identity = backend, run, processes, identity
        self._copies = copies or Copies()

    def prepare(self, state: S) -> None:
        """Begin to make the memory of the copies."""
        if self._run.recipe.checkpoint.asynchronous:
            self._copies.make_room(self._backend.copied_bytes(state))

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Copy this process's shards of `state`; the function that is returned writes them, and returns their digests.

        The copies are in the memory of the save before, which has ended.
        """
        with self._copies.filling() as copy:
            shards = list(self._backend.shards_of(state, copy))
        if not self._run.recipe.checkpoint.asynchronous:
            self._copies.release()
        metadata = metadata_of(state.step, self._run.recipe, self._identity)
        return lambda: write_shards(folder, shards, self._processes, metadata=metadata)

    def restore(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        return self._backend.restore(state, load(path, self._run))


def metadata_of(step: int, recipe: Recipe, identity: Identity | None) -> dict[str, str]:
    """What a file says of itself, so that one of another run or step is recognised."""
    return {"step": str(step), **run_metadata(recipe.model_dump(mode="json", by_alias=True), identity)}


def write_shards(
    folder: Path, shards: Iterable[Shard], processes: Processes, *, metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write one process's shards, a file for each kind, flushed to the disk; returns their digests by file name.

    The files are written side by side, as a digest takes longer than the disk. Raises WeightsError for a value that is not
    finite.
    """
    shards = list(shards)

    def write(kind: ArrayKind) -> tuple[str, str] | None:
        name = file_name(kind, processes.index, processes.count)
        mine = [shard for shard in shards if shard.kind == kind]
        for shard in mine:
            if not shard.array.size or not _is_finite(shard.array):
                what = "not finite" if shard.array.size else "empty"
                raise WeightsError(f"{folder / name}: {shard.name} is {what}; no checkpoint was written")
        if not mine:
            return None
        arrays = {shard.key: shard.array for shard in mine}
        return name, write_tensors(arrays, folder / name, metadata={**metadata, "file": name})

    with ThreadPoolExecutor(len(KINDS)) as pool:
        return dict(written for written in pool.map(write, KINDS) if written)


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether all of an array is finite. Piece by piece, as one that fits the cache is looked at several times as fast."""
    flat = array.ravel(order="K")  # as it is in memory: a transposed one is not copied
    return all(np.isfinite(flat[at : at + _PIECE]).all() for at in range(0, flat.size, _PIECE))
