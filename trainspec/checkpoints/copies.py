"""Host memory for the copy that a save takes of a process's share, which the next save takes again.

Most of the time of a copy is the system's, which clears every page that is new to a process: into pages that are there a copy
takes a fifth of it (docs/decisions/0041-the-copy-of-a-save.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.files.digests import THREADS
from trainspec.files.tensors import copy_into

Array = NDArray[Any]
# Gives the copy of an array. It is filled when `Copies.filling` ends, and not to be read before.
Copy = Callable[[Array], Array]
# A thread copies so much at a time.
_PIECE_BYTES = 4 * 2**20


class Copies:
    """Arrays of the host that have the sizes of those that were copied last, in their order."""

    def __init__(self) -> None:
        self._held: list[NDArray[np.uint8]] = []

    @contextmanager
    def filling(self) -> Iterator[Copy]:
        """Inside, what is given copies; at the end all are filled. The copies of the time before are overwritten."""
        before, self._held = self._held, []
        with ThreadPoolExecutor(THREADS) as pool:
            filler = _Filler(pool)

            def copy(array: Array) -> Array:
                place = before[len(self._held)] if len(self._held) < len(before) else None
                if place is None or place.nbytes != array.nbytes:
                    place = np.empty(array.nbytes, np.uint8)
                self._held.append(place)
                target = place.view(array.dtype).reshape(array.shape)
                filler.fill(target, array)
                return target

            yield copy
            filler.finish()

    def release(self) -> None:
        """Give the memory back, as soon as nobody else has the copies."""
        self._held = []


class _Filler:
    """Copies in the threads of a pool: a large array is cut, small ones are joined to a piece of work."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._work: list[Future[None]] = []
        self._pairs: list[tuple[Array, Array]] = []
        self._bytes = 0

    def fill(self, target: Array, source: Array) -> None:
        """Begin to copy, or wait for more."""
        if not source.flags.c_contiguous:
            self._add(target, source)
            return
        # As bytes, which numpy copies at once whatever the type, without the interpreter's lock.
        into, found = (each.reshape(-1).view(np.uint8) for each in (target, source))
        for at in range(0, len(into), _PIECE_BYTES):
            self._add(into[at : at + _PIECE_BYTES], found[at : at + _PIECE_BYTES])

    def finish(self) -> None:
        """Wait until all is copied. Raises the error of one that could not be."""
        self._begin()
        for each in self._work:
            each.result()

    def _add(self, target: Array, source: Array) -> None:
        self._pairs.append((target, source))
        self._bytes += source.nbytes
        if self._bytes >= _PIECE_BYTES:
            self._begin()

    def _begin(self) -> None:
        self._work.append(self._pool.submit(_copy, self._pairs))
        self._pairs, self._bytes = [], 0


def _copy(pairs: list[tuple[Array, Array]]) -> None:
    for target, source in pairs:
        copy_into(target, source)
