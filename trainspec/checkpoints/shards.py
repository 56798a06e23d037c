"""Shards: the parts of a checkpoint's arrays that one process holds, and arrays that are read from the shards of many.

A shard is a box of its tensor: one slice for every dimension. In a file its key says which, `NAME[0:128,64:128]`, or is NAME
alone where it is the whole tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.errors import WeightsError
from trainspec.files.hf import TensorFiles
from trainspec.weight import Index, Weight

ArrayKind = Literal["weights", "moment1", "moment2"]
KINDS: tuple[ArrayKind, ...] = get_args(ArrayKind)
_FILE = re.compile(r"(?P<kind>[a-z0-9]+)(?:-\d{5}-of-\d{5})?\.safetensors")
_KEY = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<index>\d+:\d+(?:,\d+:\d+)*)\])?")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The box at `index` of the tensor `name`, whose whole shape is `shape`. `array` is a copy that no update changes."""

    kind: ArrayKind
    name: str
    shape: Shape
    index: Index
    array: NDArray[Any]

    @property
    def key(self) -> str:
        """Its name in a file."""
        return key_of(self.name, self.shape, self.index)


def file_name(kind: ArrayKind, process: int, processes: int) -> str:
    """The file of one process's shards of a kind."""
    return f"{kind}.safetensors" if processes == 1 else f"{kind}-{process:05d}-of-{processes:05d}.safetensors"


def files_of(kind: ArrayKind, names: Iterable[str]) -> list[str]:
    """Those of `names` that hold shards of a kind."""
    return sorted(name for name in names if (match := _FILE.fullmatch(name)) and match["kind"] == kind)


def as_shards(kind: ArrayKind, arrays: Mapping[str, NDArray[Any]]) -> Iterator[Shard]:
    """Each array as the one shard of its tensor."""
    for name, array in arrays.items():
        yield Shard(kind, name, array.shape, everything(array.shape), array)


def everything(shape: Shape) -> Index:
    """The index of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def key_of(name: str, shape: Shape, index: Index) -> str:
    """The key of a box in a file."""
    if index == everything(shape):
        return name
    return f"{name}[{','.join(f'{s.start}:{s.stop}' for s in index)}]"


def boxes(shape: Shape, first: int, end: int) -> Iterator[Index]:
    """The boxes that elements `first` to `end` of a tensor in row-major order consist of; at most 2 × dimensions − 1."""
    if first >= end:
        return
    if len(shape) <= 1:
        yield tuple(slice(first, end) for _ in shape)
        return
    inner = math.prod(shape[1:])
    (row, begin), (last, rest) = divmod(first, inner), divmod(end, inner)
    if begin:
        stop = inner if row < last else rest
        yield from ((slice(row, row + 1), *index) for index in boxes(shape[1:], begin, stop))
        if row == last:
            return
        row += 1
    if row < last:
        yield (slice(row, last), *everything(shape[1:]))
    if rest:
        yield from ((slice(last, last + 1), *index) for index in boxes(shape[1:], 0, rest))


class ShardFiles:
    """The tensors of one kind, read from the shards in several files: of each file only the bytes that are asked for.

    `shapes` has the whole shapes; without it every key is a whole tensor, as in checkpoints of versions that gathered them.
    Raises WeightsError, before any data is read, where the shards of a tensor overlap or leave something out.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, Shape] | None, *, where: Path) -> None:
        self._shards: dict[str, list[tuple[Index, TensorFiles, str]]] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        for path in files:
            file = TensorFiles([path])
            for key, shape in file.shapes.items():
                self._add(file, path, key, shape, shapes)
        for name, shards in self._shards.items():
            _check_tiling(name, self.shapes[name], [index for index, _, _ in shards], where)

    def _add(
        self, file: TensorFiles, path: Path, key: str, shape: Shape, shapes: Mapping[str, Shape] | None
    ) -> None:
        match = _KEY.fullmatch(key)
        name = match["name"] if match else key
        whole_shape = shape if shapes is None else shapes.get(name)
        if match is None or whole_shape is None:
            raise WeightsError(f"{path}: {key} is unexpected; the checkpoint has no such tensor")
        index = everything(whole_shape)
        if match["index"]:
            index = tuple(slice(*map(int, pair.split(":"))) for pair in match["index"].split(","))
        if len(index) != len(whole_shape) or tuple(s.stop - s.start for s in index) != shape:
            raise WeightsError(f"{path}: {key} has shape {list(shape)}, which is not what its name says")
        if self.dtypes.setdefault(name, file.dtypes[key]) != file.dtypes[key]:
            raise WeightsError(
                f"{path}: {key} is {file.dtypes[key]}, another shard of it {self.dtypes[name]}"
            )
        self.shapes[name] = whole_shape
        self._shards.setdefault(name, []).append((index, file, key))

    def read(self, name: str, index: Index) -> NDArray[Any]:
        """The box `index` of a tensor, in its stored type."""
        wanted = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, self.shapes[name], strict=True))
        found: NDArray[Any] | None = None
        for held, file, key in self._shards[name]:
            common = _intersection(wanted, held)
            if common is None:
                continue
            data = file.read(key, _shifted(common, held))
            if common == wanted:
                return data
            if found is None:
                found = np.empty([s.stop - s.start for s in wanted], self.dtypes[name])
            found[_shifted(common, wanted)] = data
        return np.empty([s.stop - s.start for s in wanted], self.dtypes[name]) if found is None else found

    def weight(self, name: str, dtype: DTypeLike | None) -> Weight:
        """One tensor as `dtype` (None: as stored), read on demand."""
        wanted = self.dtypes[name] if dtype is None else np.dtype(dtype)
        return Weight(self.shapes[name], wanted, lambda index: self.read(name, index))


def _intersection(a: Index, b: Index) -> Index | None:
    common = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return common if all(s.start < s.stop for s in common) else None


def _shifted(index: Index, origin: Index) -> Index:
    """`index` counted from the corner of `origin`."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(index, origin, strict=True))


def _check_tiling(name: str, shape: Shape, indices: Sequence[Index], where: Path) -> None:
    """Raises WeightsError unless every element of the tensor is in exactly one box."""
    if list(indices) == [everything(shape)]:
        return
    cuts = [
        sorted({0, size, *(e for i in indices for e in (i[dim].start, i[dim].stop))})
        for dim, size in enumerate(shape)
    ]
    cells = np.zeros([len(c) - 1 for c in cuts], np.int64)
    at = [{edge: position for position, edge in enumerate(c)} for c in cuts]
    for index in indices:
        if any(s.stop > size for s, size in zip(index, shape, strict=True)):
            raise WeightsError(f"{where}: a shard of {name} lies outside of its shape {list(shape)}")
        cells[tuple(slice(where_[s.start], where_[s.stop]) for where_, s in zip(at, index, strict=True))] += 1
    if (cells == 0).any():
        raise WeightsError(f"{where}: incomplete checkpoint: no file has all of {name}")
    if (cells > 1).any():
        raise WeightsError(f"{where}: several files have the same elements of {name}")
