"""Initial values: numpy, counter-based, keyed by (seed, canonical name).

The same numbers on every backend and topology. Element i of a tensor is a function of (seed, name, i) alone,
so a shard is made where it lives.
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
    """Every weight of the run as training starts, in the order of `full_table`, in the run's stored type.

    Files are checked before the first is given; a weight is read or drawn as far as it is asked for.

    The model's come from its files or are drawn (`model.weights`); the method's from `method.adapter`, from its text,
    from other starting weights, or are drawn.
    """
    dtype, method = STORED_DTYPE[run.recipe.precision.policy], run.recipe.method
    if method.start is not None:
        added = read_adapter(method.start, run.spec, method, run.method_table, dtype=dtype)
    else:
        added = iter(_method_starts(run, dtype))
    return chain(base_weights(run, dtype), added)


def base_weights(run: Run, dtype: DTypeLike) -> Iterator[tuple[Param, Weight]]:
    """The model's own weights as `dtype`, from its files or drawn."""
    if run.recipe.model.weights == "random":
        return _all_drawn(run.model_table, seed=run.recipe.run.seed, dtype=dtype)
    assert run.directory is not None  # resolve_model refuses pretrained weights of a preset
    return read_model(run.directory, run.spec, run.model_table, dtype=dtype)


def _method_starts(run: Run, dtype: DTypeLike) -> list[tuple[Param, Weight]]:
    """The method's weights where no adapter gives them."""
    others: dict[str, Weight] = {}
    if any(isinstance(param.init, FromWeights) for param in run.method_table):
        drawn_too = (p for p in run.method_table if not isinstance(p.init, FromText | FromWeights))
        starts = chain(base_weights(run, dtype), _all_drawn(drawn_too, seed=run.recipe.run.seed, dtype=dtype))
        others = {param.name: weight for param, weight in starts}
    return [(param, _start(param, others, run, dtype)) for param in run.method_table]


def _start(param: Param, others: Mapping[str, Weight], run: Run, dtype: DTypeLike) -> Weight:
    """The start of one weight, which may be made of `others`."""
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
            return drawn(param, seed=run.recipe.run.seed, dtype=dtype)


def _all_drawn(table: Iterable[Param], *, seed: int, dtype: DTypeLike) -> Iterator[tuple[Param, Weight]]:
    return ((p, drawn(p, seed=seed, dtype=dtype)) for p in table)


def drawn(param: Param, *, seed: int, dtype: DTypeLike) -> Weight:
    """The start of one row of the table, drawn as far as it is asked for."""
    return Weight(
        param.shape,
        np.dtype(dtype),
        lambda index: initial_value(param, seed=seed, dtype=dtype, index=index),
    )


def initial_value(param: Param, *, seed: int, dtype: DTypeLike, index: Index | None = None) -> NDArray[Any]:
    """The start of one row of the table, in its shape and canonical layout, drawn in float64, then cast.

    With `index` (a slice for every dimension) it is that part, and no more than that is drawn.
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
            raise ValueError(f"{param.name} is not drawn: `starting_weights` makes it")
        case other:
            assert_never(other)
    return values.astype(dtype)


def _elements(shape: tuple[int, ...], index: Index | None) -> NDArray[np.uint64]:
    """The number of each element of the part, counted through the whole tensor in row-major order."""
    element = np.zeros((), np.uint64)
    for size, part in zip(shape, index or (slice(None),) * len(shape), strict=True):
        along = np.arange(*part.indices(size), dtype=np.uint64)
        element = element[..., None] * np.uint64(size) + along
    return element


def _uniform(
    param: Param, seed: int, element: NDArray[np.uint64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two uniforms in [0, 1) per element, 32 and 32 bits of one counter's block."""
    low, high = (
        (element & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        (element >> np.uint64(32)).astype(np.uint32),
    )
    word0, word1 = threefry2x32(name_key(seed, "init", param.name), low, high)
    return word0.astype(np.float64) / 2**32, word1.astype(np.float64) / 2**32
