"""Weights perturbed by one random rounding each, to measure how sensitive a run is to rounding.

The method is TTrace's (arXiv 2506.09280), which measures within one framework.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.rng import name_key

Array = NDArray[Any]
# Number of draws. With few draws the bound gets wider, which the coarse rounding of bf16 can least afford.
DRAWS = {"fp32": 3, "bf16": 8}


def perturbed(weight: Array, name: str, *, unit: float, draw: int, step: int) -> Array:
    """`weight` (float64) with every element moved up or down by the largest rounding: w (1 ± unit).

    The signs depend on (draw, step, name) only. Zeros stay zero, as they do under rounding.
    """
    random = np.random.default_rng((draw, step, *map(int, name_key(draw, "perturb", name))))
    signs = random.integers(0, 2, weight.shape, dtype=np.int8) * 2.0 - 1.0
    return weight.astype(np.float64) * (1.0 + unit * signs)


def folded(array: Array) -> Array:
    """[rows, columns] of any array: the last dimension against all others; a vector is one row."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
