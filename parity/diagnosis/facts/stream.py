"""The residual stream made again: what a layer adds to what, by regression on the recorded points of each side.

block = a · x + b · attention + c · mlp + d · input_norm      [examples, positions, embed]; the contract's is a = b = c = 1, d = 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES, as_float64
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.factors import MAX_RESIDUAL
from parity.diagnosis.view import Array, View

# Points at which a sum that is made otherwise shows first: the norm after it, or the sum itself.
SHOWS = re.compile(r"layers\.(\d+)\.(?:post_norm|block)")
# A coefficient is another one if it is off by this; bfloat16 streams fit to a thousandth.
OFF = 0.02


def sums(view: View) -> Iterator[Fact]:
    """A factor of what a layer adds, or a stream that goes on from the normed one."""
    point = SHOWS.fullmatch(view.tensor)
    if view.phase != "activation" or point is None:
        return
    layer = int(point[1])
    found = [_coefficients(view, layer, side) for side in (0, 1)]
    right = np.array([1.0, 1.0, 1.0, 0.0])
    for at, (mine, other) in enumerate(zip(found, found[::-1], strict=True)):
        if mine is None or other is None or np.abs(other - right).max() > OFF:
            continue
        x, attention, mlp, normed = mine
        if abs(x - 1.0) > OFF and abs(normed - 1.0) <= OFF:
            yield Fact(
                "stream-of-normed", f"{NAMES[at]}'s stream after layer {layer} goes on from the normed input"
            )
        elif abs(attention - 1.0) > OFF or abs(mlp - 1.0) > OFF:
            yield Fact(
                "stream-factor",
                f"{NAMES[at]}'s stream after layer {layer} is {x:.4g} times its input, {attention:.4g} times attention"
                f" and {mlp:.4g} times the MLP",
            )


def _coefficients(view: View, layer: int, side: int) -> Array | None:
    """Those of a side's stream; None where a point is not recorded, or no such sum fits."""
    before = f"layers.{layer - 1}.block" if layer else "embedding"
    names = (before, f"layers.{layer}.attention", f"layers.{layer}.mlp", f"layers.{layer}.input_norm")
    arrays = [
        view.pair.read(view.step, "activation", name)[side] for name in (*names, f"layers.{layer}.block")
    ]
    if any(array is None for array in arrays):
        return None
    *columns, stream = (as_float64(array).ravel() for array in arrays if array is not None)
    if len({len(column) for column in (*columns, stream)}) > 1 or not np.isfinite(stream).all():
        return None
    factors = np.linalg.lstsq(np.stack(columns, axis=1), stream, rcond=None)[0]
    rest = float(np.linalg.norm(stream - np.stack(columns, axis=1) @ factors))
    return factors if rest <= MAX_RESIDUAL * float(np.linalg.norm(stream)) else None
