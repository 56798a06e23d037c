"""Host memory for the copy that a save takes of a process's share: made while the first updates are, and taken by every save.

Most of the time of a copy is the system's, which clears every page that is new to a process: into pages that are there a copy
takes a fifth of it (docs/decisions/0041-the-copy-of-a-save.md).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.files.digests import THREADS
from trainspec.files.tensors import copy_into

Array = NDArray[Any]
# Gives the copy of an array. It is filled when `Copies.filling` ends, and not to be read before.
Copy = Callable[[Array], Array]
# What is to be written, and what is written there.
Pair = tuple[Array, Array]
# A thread copies so much at a time.
_PIECE_BYTES = 4 * 2**20


class Copies:
    """Arrays of the host that have the sizes of those that were copied last, in their order."""

    def __init__(self) -> None:
        self._held: list[NDArray[np.uint8]] = []
        self._making: threading.Thread | None = None

    def make_room(self, sizes: Iterable[int]) -> None:
        """Begin to make the memory for copies of so many bytes each, in a thread; `filling` waits for it."""
        self._held = [np.empty(size, np.uint8) for size in sizes]
        # One that is not needed in the end does not keep the program from ending.
        self._making = threading.Thread(
            target=_touch, args=(self._held,), name="room for a copy", daemon=True
        )
        self._making.start()

    def wait(self) -> None:
        """Wait for the memory that is being made."""
        if self._making is not None:
            self._making.join()
            self._making = None

    @contextmanager
    def filling(self) -> Iterator[Copy]:
        """Inside, what is given copies; at the end all are filled. The copies of the time before are overwritten."""
        self.wait()
        before, self._held = self._held, []
        pairs: list[Pair] = []

        def copy(array: Array) -> Array:
            place = before[len(self._held)] if len(self._held) < len(before) else None
            if place is None or place.nbytes != array.nbytes:
                place = np.empty(array.nbytes, np.uint8)
            self._held.append(place)
            target = place.view(array.dtype).reshape(array.shape)
            pairs.append((target, array))
            return target

        yield copy
        _fill(pairs)

    def release(self) -> None:
        """Give the memory back, as soon as nobody else has the copies."""
        self._held = []


def _touch(places: Sequence[NDArray[np.uint8]]) -> None:
    """Write to every page, so that the system clears it now."""
    for place in places:
        place[:: mmap.PAGESIZE] = 0


def _fill(pairs: Sequence[Pair]) -> None:
    """Copy, in threads. Raises the error of one that could not."""
    portions = list(_portions(pairs))  # a thread would wait for the interpreter's lock while more are made
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_copy, portions))


def _portions(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """What a thread copies at a time: large arrays are cut, and small ones are joined."""
    portion: list[Pair] = []
    size = 0
    for piece in (piece for pair in pairs for piece in _pieces(*pair)):
        portion.append(piece)
        size += piece[1].nbytes
        if size >= _PIECE_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _pieces(target: Array, source: Array) -> Iterator[Pair]:
    if not source.flags.c_contiguous:
        yield target, source
        return
    # As bytes, which numpy copies at once whatever the type, without the interpreter's lock.
    into, found = (each.reshape(-1).view(np.uint8) for each in (target, source))
    for at in range(0, len(into), _PIECE_BYTES):
        yield into[at : at + _PIECE_BYTES], found[at : at + _PIECE_BYTES]


def _copy(pairs: Sequence[Pair]) -> None:
    for target, source in pairs:
        copy_into(target, source)
