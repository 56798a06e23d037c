"""A weight that is read or drawn on demand, slice by slice: a process takes only what its devices hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# One slice for every dimension.
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Weight:
    """`weight[index]` is that slice of it as a numpy array, `weight[...]` all of it; neither is cached here."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[Index], Array]

    def __getitem__(self, index: Index | EllipsisType) -> Array:
        if index is ...:
            index = (slice(None),) * len(self.shape)
        return self.read(index).astype(self.dtype, copy=False)


# What a backend is given: `[index]` and `[...]` mean the same of both.
WeightLike = Weight | Array
