"""Processes that save small states into one directory: threads here, each with a store of its own, or forks."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.portable import metadata_of, write_shards
from trainspec.checkpoints.shards import KINDS, Shard, ShardFiles, boxes, files_of
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.recipe import Recipe
from trainspec.runs.processes import Processes

SHAPES = {"a": (6, 4), "b": (5,), "c.weight": (3, 2, 4)}


def recipe_of(seed: int = 0, **checkpoint: Any) -> Recipe:
    """A recipe of nothing; with another seed it is another run."""
    return Recipe.model_validate(
        {
            "model": {"from": "preset:tiny", "weights": "random"},
            "data": {"train": "x.jsonl", "heldout": "y.jsonl"},
            "run": {"seed": seed},
            "checkpoint": checkpoint,
        }
    )


@dataclass(frozen=True)
class State:
    """A state whose arrays follow from its step and the run's seed."""

    step: int
    seed: int = 0

    def arrays(self, kind: str) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.step, self.seed, KINDS.index(kind)])
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def shards_of(state: State, processes: Processes) -> Iterator[Shard]:
    """What one of the processes holds: a stretch of every tensor in row-major order."""
    for kind in KINDS:
        for name, array in state.arrays(kind).items():
            first, end = (
                array.size * edge // processes.count for edge in (processes.index, processes.index + 1)
            )
            for index in boxes(array.shape, first, end):
                yield Shard(kind, name, array.shape, index, array[index].copy())


class Sharded:
    """The portable format for such states. `hold` keeps the writer waiting, `fail` is called before it writes."""

    name = "portable"

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self._recipe, self._processes = recipe, processes
        self.hold, self.fail = threading.Event(), lambda step: None
        self.hold.set()

    def prepare(self, state: State) -> None:
        pass

    def begin(self, folder: Path, state: State) -> Callable[[], dict[str, str]]:
        shards = list(shards_of(state, self._processes))

        def write() -> dict[str, str]:
            self.hold.wait(60)
            self.fail(state.step)
            metadata = metadata_of(state.step, self._recipe, None)
            return write_shards(folder, shards, self._processes, metadata=metadata)

        return write

    def restore(self, state: State, path: Path) -> State:
        raise AssertionError


def store_of(
    out: Path, processes: Processes | None = None, *, seed: int = 0, **settings: Any
) -> tuple[CheckpointStore[State], Sharded]:
    """A store and its format, with these settings of a recipe's `checkpoint`."""
    processes, recipe = processes or Processes(), recipe_of(seed, **settings)
    array_format = Sharded(recipe, processes)
    manifest = manifest_of(recipe, None, SHAPES)
    return CheckpointStore(out, array_format, manifest, recipe.checkpoint, processes), array_format


def in_processes(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns in each of some processes that can exchange words; raises the first error."""
    meeting, words = threading.Barrier(count, timeout=60), [""] * count
    found: list[Any] = [None] * count

    def exchange(index: int, word: str) -> list[str]:
        words[index] = word
        meeting.wait()
        said = list(words)
        meeting.wait()
        return said

    def run(index: int) -> None:
        try:
            found[index] = work(Processes(index, count, lambda word: exchange(index, word)))
        except BaseException as error:
            found[index] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def save(out: Path, *steps: int, count: int = 1, seed: int = 0, **settings: Any) -> None:
    """Save the states of some steps, one after the other."""

    def work(processes: Processes) -> None:
        store, _ = store_of(out, processes, seed=seed, **settings)
        for step in steps:
            store.save(State(step, seed))
        store.wait()

    in_processes(count, work)


def holds(path: Path, state: State) -> bool:
    """Whether a checkpoint has the arrays of a state, bit for bit."""
    manifest = read_manifest(path)
    for kind in KINDS:
        files = ShardFiles(
            [path / name for name in files_of(kind, manifest.digests)], manifest.shapes, where=path
        )
        for name, array in state.arrays(kind).items():
            if not np.array_equal(files.read(name, (slice(None),) * array.ndim), array):
                return False
    return True


def forked(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own; None where that process ended before."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(read)
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    os.waitpid(process, 0)
    return json.loads(said) if said else None


def names(out: Path) -> list[str]:
    """What lies beside the checkpoints, hidden names as well."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())
