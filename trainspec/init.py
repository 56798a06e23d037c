"""Initial values: numpy, counter-based, keyed by (seed, canonical name).

The same numbers on every backend and topology. Element i of a tensor is a function of (seed, name, i) alone, so that
every device can make its own shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, assert_never

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.files.adapters import read_adapter
from trainspec.files.hf import read_model
from trainspec.from_text import text_start
from trainspec.params import FromText, FromWeights, Normal, Ones, Param, UniformFanIn, Zeros
from trainspec.plans.plan import STORED_DTYPE
from trainspec.rng import name_key, threefry2x32
from trainspec.runs.run import Run
from trainspec.weight import Index, Weight


def starting_weights(run: Run) -> Iterator[tuple[Param, Weight]]:
    """The starting value of every weight of the run, in the order of `full_table`, in the run's stored type.

    The model's are read or random (`model.weights`); the method's come from `method.adapter`, from its text, from other
    starting weights, or are random. Slices are read or drawn on demand, after all files are checked.
    """
    dtype, method = STORED_DTYPE[run.recipe.precision.policy], run.recipe.method
    if method.start is not None:
        added = read_adapter(method.start, run.spec, method, run.method_table, dtype=dtype)
    else:
        added = iter(_method_starts(run, dtype))
    return chain(base_weights(run, dtype), added)


def base_weights(run: Run, dtype: DTypeLike) -> Iterator[tuple[Param, Weight]]:
    """The model's own weights as `dtype`, from its files or random."""
    if run.recipe.model.weights == "random":
        return _random_weights(run.model_table, seed=run.recipe.run.seed, dtype=dtype)
    assert run.directory is not None  # resolve_model refuses pretrained weights of a preset
    return read_model(run.directory, run.spec, run.model_table, dtype=dtype)


def _method_starts(run: Run, dtype: DTypeLike) -> list[tuple[Param, Weight]]:
    """The method's weights where there is no adapter to start from."""
    others: dict[str, Weight] = {}
    if any(isinstance(param.init, FromWeights) for param in run.method_table):
        drawable = (p for p in run.method_table if not isinstance(p.init, FromText | FromWeights))
        starts = chain(
            base_weights(run, dtype), _random_weights(drawable, seed=run.recipe.run.seed, dtype=dtype)
        )
        others = {param.name: weight for param, weight in starts}
    return [(param, _start(param, others, run, dtype)) for param in run.method_table]


def _start(param: Param, others: Mapping[str, Weight], run: Run, dtype: DTypeLike) -> Weight:
    """The starting value of one weight, which may be computed from `others`."""
    match param.init:
        case FromText():
            base = {p.name: weight for p, weight in base_weights(run, np.float64)}
            array = text_start(run.recipe, run.spec, base, directory=run.directory).astype(dtype)
            return Weight(array.shape, array.dtype, array.__getitem__)
        case FromWeights(names, make):
            # Made at the first read and kept: a backend reads once for each device, and again for master weights.
            made = cache(
                lambda: make(*(others[name][...].astype(np.float64) for name in names)).astype(dtype)
            )
            return Weight(param.shape, np.dtype(dtype), lambda index: made()[index])
        case _:
            return random_weight(param, seed=run.recipe.run.seed, dtype=dtype)


def _random_weights(table: Iterable[Param], *, seed: int, dtype: DTypeLike) -> Iterator[tuple[Param, Weight]]:
    return ((p, random_weight(p, seed=seed, dtype=dtype)) for p in table)


def random_weight(param: Param, *, seed: int, dtype: DTypeLike) -> Weight:
    """The random starting value of an entry, drawn slice by slice, on demand."""
    return Weight(
        param.shape,
        np.dtype(dtype),
        lambda index: initial_value(param, seed=seed, dtype=dtype, index=index),
    )


def initial_value(param: Param, *, seed: int, dtype: DTypeLike, index: Index | None = None) -> NDArray[Any]:
    """The random starting value of an entry in canonical layout, drawn in float64, then cast.

    With `index` (a slice for every dimension) only that slice of it is drawn.
    """
    element = _elements(param.shape, index)
    match param.init:
        case Zeros():
            return np.zeros(element.shape, dtype)
        case Ones():
            return np.ones(element.shape, dtype)
        case UniformFanIn(fan_in):
            values = (2.0 * _uniform(param, seed, element)[0] - 1.0) / np.sqrt(fan_in)
        case Normal(std):
            # Box-Muller: two uniforms give one normal value; 1 - u keeps the logarithm finite.
            first, second = _uniform(param, seed, element)
            values = std * np.sqrt(-2.0 * np.log(1.0 - first)) * np.cos(2.0 * np.pi * second)
        case FromText() | FromWeights():
            raise ValueError(f"{param.name} is not random: `starting_weights` computes it")
        case other:
            assert_never(other)
    return values.astype(dtype)


def _elements(shape: tuple[int, ...], index: Index | None) -> NDArray[np.uint64]:
    """The row-major index in the whole tensor of each element of the slice."""
    element = np.zeros((), np.uint64)
    for size, along in zip(shape, index or (slice(None),) * len(shape), strict=True):
        positions = np.arange(*along.indices(size), dtype=np.uint64)
        element = element[..., None] * np.uint64(size) + positions
    return element


def _uniform(
    param: Param, seed: int, element: NDArray[np.uint64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two uniforms in [0, 1) per element, from the two 32-bit words of its counter."""
    low, high = (
        (element & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        (element >> np.uint64(32)).astype(np.uint32),
    )
    word0, word1 = threefry2x32(name_key(seed, "init", param.name), low, high)
    return word0.astype(np.float64) / 2**32, word1.astype(np.float64) / 2**32
