"""A weight that is read, drawn or made on demand, slice by slice: a process takes only what its devices hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# One slice for every dimension.
Index = tuple[slice, ...]
# A weight that is computed on its way to a file is so in blocks of whole rows, of about so many elements.
BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Weight:
    """`weight[index]` is that slice of it as a numpy array, `weight[...]` all of it; neither is cached here.

    Who writes a weight `in_blocks` takes it block by block: no more than that is in memory then.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[Index], Array]
    in_blocks: bool = False

    def __getitem__(self, index: Index | EllipsisType) -> Array:
        if index is ...:
            index = (slice(None),) * len(self.shape)
        return self.read(index).astype(self.dtype, copy=False)


# What a backend is given: `[index]` and `[...]` mean the same of both.
WeightLike = Weight | Array


def blocks(shape: tuple[int, ...]) -> Iterator[Index]:
    """A tensor of this shape as blocks of whole rows."""
    if not shape:
        yield ()
        return
    rest = tuple(slice(0, size) for size in shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield (slice(first, min(first + step, shape[0])), *rest)


def computed(shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[[Index], Array]) -> Weight:
    """A weight that `make` computes a block at a time."""

    def read(index: Index) -> Array:
        ranges = [along.indices(size)[:2] for along, size in zip(index, shape, strict=True)]
        result = np.empty([end - first for first, end in ranges], dtype)
        for block in blocks(result.shape):
            at = (slice(b.start + first, b.stop + first) for b, (first, _) in zip(block, ranges, strict=True))
            result[block] = make(tuple(at))
        return result

    return Weight(shape, dtype, read, in_blocks=True)


def stacked(parts: Sequence[WeightLike]) -> Weight:
    """Weights one below the other, as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read(index: Index) -> Array:
        rows, *columns = index
        (first, end, _), begin, found = rows.indices(shape[0]), 0, []
        for part in parts:
            inside = slice(max(first - begin, 0), min(end - begin, part.shape[0]))
            if inside.start < inside.stop:
                found.append(part[(inside, *columns)])
            begin += part.shape[0]
        return found[0] if len(found) == 1 else np.concatenate(found)

    return Weight(shape, parts[0].dtype, read)
