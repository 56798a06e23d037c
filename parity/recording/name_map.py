"""A program's own names and layouts, and the common ones that both sides' traces use."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trainspec.errors import TraceError, nearest

Array = NDArray[Any]
Arrays = dict[str, Array]
# By name, anything that `numpy.asarray` takes, or a torch tensor.
NamedArrays = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """One own weight that is several common ones side by side along `axis`, equal parts if there are no `sizes`."""

    names: Sequence[str]
    axis: int = 0
    sizes: Sequence[int] = ()


@dataclass(frozen=True)
class Join:
    """Several own weights that are one common one, side by side along `axis`."""

    names: Sequence[str]
    axis: int = 0


class NameMap:
    """Brings arrays under the common names and into the common layout.

    `names` maps own to common names; `transpose` lists own matrices and `permute` gives the axes of own arrays, in
    `numpy.transpose`'s sense; `split` is by own name and `join` by common name, both along an axis of the common layout.
    Raises TraceError, in one line, for a map that contradicts itself.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        *,
        transpose: Collection[str] = (),
        permute: Mapping[str, Sequence[int]] | None = None,
        split: Mapping[str, Split] | None = None,
        join: Mapping[str, Join] | None = None,
    ) -> None:
        self._names, self._split, self._join = dict(names), dict(split or {}), dict(join or {})
        self._axes: dict[str, Sequence[int]] = dict.fromkeys(transpose, (1, 0)) | dict(permute or {})
        self._transposed = frozenset(transpose)
        joined = [own for each in self._join.values() for own in each.names]
        self.own = (*self._names, *self._split, *joined)
        self.common = (
            *self._names.values(),
            *(name for each in self._split.values() for name in each.names),
            *self._join,
        )
        if isinstance(transpose, str):
            raise TraceError(f"transpose is a text, {transpose!r}; give a list of names")
        if twice := _repeated(self.own):
            raise TraceError(
                f"{twice!r} is in more than one of the name map, split and join; give it one meaning"
            )
        if twice := _repeated(self.common):
            raise TraceError(f"the name map gives {twice!r} to more than one weight; each needs its own")
        self._check_layouts(transpose, permute or {})

    def told_order(self, recorded: Iterable[str]) -> list[str]:
        """The common names in the order of the own ones that were recorded; what is joined comes with its first part."""
        parts = {own: common for common, each in self._join.items() for own in each.names}
        order: list[str] = []
        for own in recorded:
            if own in self._split:
                order += self._split[own].names
            else:
                order.append(self._names.get(own) or parts[own])
        return list(dict.fromkeys(order))

    @property
    def orders_all(self) -> bool:
        """Whether the map's own order says where each weight is; a fused weight has no position among the others."""
        return not (self._split or self._join)

    def _check_layouts(self, transpose: Collection[str], permute: Mapping[str, Sequence[int]]) -> None:
        for what, listed in (("transpose", transpose), ("permute", permute)):
            for name in listed:
                if name not in self.own:
                    raise TraceError(f"{what}: {name!r} is not in the name map{nearest(name, self.own)}")
        if both := sorted(set(transpose) & set(permute)):
            raise TraceError(f"{both[0]!r} is in transpose and in permute; permute alone says it")
        for name, axes in permute.items():
            if sorted(axes) != list(range(len(axes))):
                raise TraceError(
                    f"permute: {name!r}: {list(axes)} is not an order of the axes 0 to {len(axes) - 1}"
                )
        for what, listed in (("split", self._split), ("join", self._join)):
            for name, each in listed.items():
                if isinstance(each.names, str) or len(each.names) < 2:
                    raise TraceError(
                        f"{what}: {name!r} has one part; give a list of several names, or put it into names"
                    )
        for name, each in self._split.items():
            if each.sizes and len(each.sizes) != len(each.names):
                raise TraceError(f"split: {name!r} has {len(each.names)} names and {len(each.sizes)} sizes")

    def mapped(
        self, what: str, arrays: NamedArrays, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Arrays:
        """Copies by common name and in the common layout; `what` names them in errors.

        With `shapes`, those of the own weights, an array of another shape (a slot that sums over rows) keeps its layout.
        """
        own: Arrays = {}
        for name, array in arrays.items():
            if name not in self.own:
                raise TraceError(f"{what}: {name!r} is not in the name map{nearest(name, self.own)}")
            plain = copied(array, f"{what}: {name!r}")
            fits = shapes is None or plain.shape == shapes.get(name)
            if not fits and name not in self._names:
                raise TraceError(
                    f"{what}: {name!r} has shape {list(plain.shape)} and is not its weight's, so it can be neither split nor "
                    "joined; leave this slot out"
                )
            own[name] = self._laid_out(what, name, plain) if fits else plain
        mapped = {common: own[name] for name, common in self._names.items() if name in own}
        for name, each in self._split.items():
            if name in own:
                mapped |= _parts(what, name, own[name], each)
        for name, each in self._join.items():
            there = [part for part in each.names if part in own]
            if there and len(there) < len(each.names):
                gone = next(part for part in each.names if part not in own)
                raise TraceError(
                    f"{what}: no {gone!r}, which is joined with {there[0]!r} to {name!r}; give both or neither"
                )
            if there:
                mapped[name] = _joined(what, name, [own[part] for part in each.names], each)
        return mapped

    def _laid_out(self, what: str, name: str, array: Array) -> Array:
        axes = self._axes.get(name)
        if axes is None:
            return array
        if array.ndim != len(axes):
            way = "; give its axes in permute" if name in self._transposed else ""
            raise TraceError(f"{what}: {name!r} has {array.ndim} dimensions, its layout {len(axes)}{way}")
        return np.ascontiguousarray(array.transpose(axes))


def copied(array: Any, what: str) -> Array:
    """A copy in numpy; a torch tensor is detached, and a mask is uint8, as whole numbers have no precision to check."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":  # numpy has no such type
            bits = array.contiguous().view(sys.modules["torch"].int16).numpy()
            array = bits.view(ml_dtypes.bfloat16)
        elif hasattr(array, "numpy"):
            array = array.numpy()
    try:
        copy = np.array(array, order="C", copy=True)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{what} is not an array: {error}") from None
    if copy.dtype.kind in "OUSMmc":
        given = (
            "None; leave it out" if array is None else f"of type {type(array).__name__}; give real numbers"
        )
        raise TraceError(f"{what} is {given}")
    return copy.astype(np.uint8) if copy.dtype == np.bool_ else copy


def _parts(what: str, name: str, array: Array, split: Split) -> Arrays:
    _check_axis(what, name, array, split.axis)
    whole = array.shape[split.axis]
    sizes = list(split.sizes) or [whole // len(split.names)] * len(split.names)
    if sum(sizes) != whole:
        raise TraceError(f"{what}: {name!r} has {whole} entries along axis {split.axis}, its parts {sizes}")
    parts = np.split(array, list(accumulate(sizes))[:-1], axis=split.axis)
    return {part: np.ascontiguousarray(each) for part, each in zip(split.names, parts, strict=True)}


def _joined(what: str, name: str, arrays: Sequence[Array], join: Join) -> Array:
    _check_axis(what, name, arrays[0], join.axis)
    try:
        return np.concatenate(arrays, axis=join.axis)
    except ValueError:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise TraceError(f"{what}: {name!r}: {shapes} do not join along axis {join.axis}") from None


def _check_axis(what: str, name: str, array: Array, axis: int) -> None:
    if not -array.ndim <= axis < array.ndim:
        raise TraceError(f"{what}: {name!r} has {array.ndim} dimensions and no axis {axis}")


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
