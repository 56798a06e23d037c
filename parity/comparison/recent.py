"""What a comparison keeps in memory: arrays that were used lately, up to a number of bytes, the others on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = tuple[Array | None, ...]
A = TypeVar("A", bound=Arrays)
# Enough for every tensor of two steps of a small model, so that none is read twice; little beside one tensor of a large one.
HELD_BYTES = 256 * 2**20


class RecentArrays:
    """Arrays by key, the ones used last. The last is kept whatever its size, the others while all fit in `limit` bytes."""

    def __init__(self, limit: int, *, dropped: Callable[[Hashable, Arrays], None] | None = None) -> None:
        self._limit, self._dropped = limit, dropped
        self._arrays: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], A]) -> A:
        """The arrays of `key`, made where they are not kept."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]  # pyright: ignore[reportReturnType]: of one key all have one type
        arrays = make()
        self.put(key, arrays)
        return arrays

    def put(self, key: Hashable, arrays: Arrays) -> None:
        """Keep `arrays`, instead of what was kept of `key`, and drop what was not used for longest."""
        self._bytes += _bytes(arrays) - _bytes(self._arrays.pop(key, ()))
        self._arrays[key] = arrays
        while self._bytes > self._limit and len(self._arrays) > 1:
            self._drop(next(iter(self._arrays)))

    def forget(self, is_old: Callable[[Any], bool]) -> None:
        """Drop the arrays of the keys that are no longer needed."""
        for key in [key for key in self._arrays if is_old(key)]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        arrays = self._arrays.pop(key)
        self._bytes -= _bytes(arrays)
        if self._dropped:
            self._dropped(key, arrays)


class ArraysOnDisk:
    """Pairs of arrays of which only the last used are in memory; the others are in files, in TMPDIR, that go with this object."""

    def __init__(self, limit: int) -> None:
        self._recent = RecentArrays(limit, dropped=self._write)
        self._directory: TemporaryDirectory[str] | None = None
        self._numbers: dict[Hashable, int] = {}
        self._unsaved: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` has arrays."""
        return key in self._numbers

    def get(self, key: Hashable) -> tuple[Array, Array]:
        """The arrays of `key`."""
        return self._recent.get(key, lambda: self._read(key))

    def put(self, key: Hashable, arrays: tuple[Array, Array]) -> None:
        """Keep `arrays` instead of what was kept of `key`."""
        self._numbers.setdefault(key, len(self._numbers))
        self._unsaved.add(key)
        self._recent.put(key, arrays)

    def _files(self, key: Hashable) -> Path:
        if self._directory is None:
            self._directory = TemporaryDirectory(prefix="parity-")
        return Path(self._directory.name) / str(self._numbers[key])

    def _write(self, key: Hashable, arrays: Arrays) -> None:
        if key in self._unsaved:
            self._unsaved.remove(key)
            for side, array in enumerate(arrays):
                np.save(f"{self._files(key)}-{side}.npy", np.asarray(array))

    def _read(self, key: Hashable) -> tuple[Array, Array]:
        left, right = (np.load(f"{self._files(key)}-{side}.npy") for side in range(2))
        return left, right


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays if array is not None)
