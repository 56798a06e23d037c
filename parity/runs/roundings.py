"""How often the float64 reference is drawn with roundings, and how large they are.

Sources: TTrace, arXiv 2506.09280, measures sensitivity to rounding within one framework, by perturbing its input;
Parker, "Monte Carlo arithmetic" (UCLA CSD-970002, 1997), rounds every result at random.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
# Number of draws. The rounding of bf16 is coarse: the margin for few draws widens its bounds the most.
DRAWS = {"fp32": 4, "bf16": 8}


def folded(array: Array) -> Array:
    """`array` as [rows, columns]: the last dimension against all others; a vector is one row."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
