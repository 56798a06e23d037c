"""The portable format: every process writes its shards as safetensors files, and any backend and plan reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic

import numpy as np

from trainspec.checkpoints.checkpoint import load
from trainspec.checkpoints.shards import KINDS, Shard, file_name
from trainspec.errors import WeightsError
from trainspec.files.tensors import write_tensors
from trainspec.runs.contract import Backend, S
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run


class PortableFormat(Generic[S]):
    """Writes what `shards_of` gives and reads it back."""

    name = "portable"

    def __init__(self, backend: Backend[S], run: Run, processes: Processes) -> None:
        self._backend, self._run, self._processes = backend, run, processes

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Copy this process's shards of `state`; the function that is returned writes them, and returns their digests."""
        shards = list(self._backend.shards_of(state))
        return lambda: write_shards(folder, shards, self._processes)

    def restore(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        return self._backend.restore(state, load(path, self._run))


def write_shards(folder: Path, shards: Iterable[Shard], processes: Processes) -> dict[str, str]:
    """Write one process's shards, a file for each kind, flushed to the disk; returns the SHA-256 by file name.

    Raises WeightsError for a value that is not finite.
    """
    shards, digests = list(shards), {}
    for kind in KINDS:
        path = folder / file_name(kind, processes.index, processes.count)
        mine = [shard for shard in shards if shard.kind == kind]
        for shard in mine:
            if not shard.array.size or not np.isfinite(shard.array).all():
                what = "not finite" if shard.array.size else "empty"
                raise WeightsError(f"{path}: {shard.name} is {what}; no checkpoint was written")
        if mine:
            digests[path.name] = write_tensors({shard.key: shard.array for shard in mine}, path)
    return digests
