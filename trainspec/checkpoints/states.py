"""What checkpoints ask of a backend: states, what of a state is saved, and how arrays become files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import Shard
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run


class HasStep(Protocol):
    """A state of training."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        ...


S = TypeVar("S", bound=HasStep)


class ArrayFormat(Protocol[S]):
    """How the arrays of a state become files, and files arrays."""

    name: str

    def prepare(self, state: S) -> None:
        """Begin what later saves of states like this one need, beside the updates. `begin` may be called without it."""
        ...

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Take a copy of what this process saves of `state`, which may change as soon as this returns.

        The function that is returned writes it into `folder`, in another thread, and returns the digest of each file by its path
        there (`files.digests`).
        """
        ...

    def restore(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        ...


class States(Protocol[S]):
    """The functions of a backend's `step` that make states and save them."""

    def init_state(self, run: Run, *, like: S | None = None) -> S:
        """The run before its first update. Reuses what was compiled for `like`, a state of an equal recipe."""
        ...

    def shards_of(self, state: S, copy: Copy = np.copy) -> Iterator[Shard]:
        """Copies of what this process saves: of all processes together every element of weights and moments once.

        `copy` makes those of arrays that are on the host. They are filled when `Copies.filling` ends, and not to be read before.
        """
        ...

    def copied_bytes(self, state: S) -> list[int]:
        """The size of each array that `shards_of` gives to `copy`, in order."""
        ...

    def restore(self, state: S, checkpoint: Checkpoint) -> S:
        """`state` as it was when `checkpoint` was taken; consumes `state`."""
        ...

    def native_format(self, run: Run, processes: Processes) -> ArrayFormat[S]:
        """What `checkpoint.format: native` is. Called where the backend's capabilities have it."""
        ...
