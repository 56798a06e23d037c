"""One rounding of every weight, drawn: how the sensitivity of a run is measured.

Source of the method: TTrace, arXiv 2506.09280, which measures it within one framework.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.rng import name_key

Array = NDArray[Any]
# How often. The rounding of bf16 is coarse: what few draws cost there is paid out of what the bound can tell.
DRAWS = {"fp32": 3, "bf16": 8}


def perturbed(weight: Array, name: str, *, unit: float, draw: int, step: int) -> Array:
    """`weight` (float64) with every element moved by the largest rounding, up or down: w (1 ± unit).

    The signs are a function of (draw, step, name) alone. Zeros stay zero, as they do under rounding.
    """
    random = np.random.default_rng((draw, step, *map(int, name_key(draw, "perturb", name))))
    signs = random.integers(0, 2, weight.shape, dtype=np.int8) * 2.0 - 1.0
    return weight.astype(np.float64) * (1.0 + unit * signs)


def folded(array: Array) -> Array:
    """[rows, columns] of any array: the last dimension against all others; a vector is one row."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
