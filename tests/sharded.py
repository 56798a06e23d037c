"""Checkpoints as several processes write them, without a backend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.checkpoints import folders
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.portable import metadata_of, write_shards
from trainspec.checkpoints.shards import Shard, boxes
from trainspec.checkpoints.store import manifest_of
from trainspec.recipe import Recipe
from trainspec.runs.processes import Processes

Arrays = Mapping[str, NDArray[Any]]


def save_sharded(
    out: Path,
    kinds: Mapping[str, Arrays],
    *,
    recipe: Recipe,
    step: int,
    processes: int = 2,
    identity: Identity | None = None,
    **fields: Any,
) -> Path:
    """A checkpoint of `kinds` (weights, moment1, moment2), each process with an equal stretch of every tensor.

    `fields` are further ones of the manifest.
    """
    folder = folders.unfinished(out, step)
    folder.mkdir(parents=True)
    manifest = manifest_of(recipe, identity, {name: array.shape for name, array in kinds["weights"].items()})
    digests: dict[str, str] = {}
    for process in range(processes):
        shards = [
            shard
            for kind, arrays in kinds.items()
            for name, array in arrays.items()
            for shard in _stretch(kind, name, array, process, processes)
        ]
        metadata = metadata_of(step, recipe, identity)
        digests |= write_shards(folder, shards, Processes(process, processes), metadata=metadata)
    sizes = {name: (folder / name).stat().st_size for name in digests}
    replace(manifest, step=step, digests=digests, sizes=sizes, **fields).write(folder)
    return folders.commit(out, step)


def _stretch(kind: Any, name: str, array: NDArray[Any], process: int, processes: int) -> Iterator[Shard]:
    size = math.prod(array.shape)
    first, end = (size * i // processes for i in (process, process + 1))
    for index in boxes(array.shape, first, end):
        yield Shard(kind, name, array.shape, index, np.array(array[index]))
