"""A recomputed forward pass that draws other dropout masks."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array, lax

from jaxtrain.dropout import DropoutPoint


def redrawn(layer: Callable[[DropoutPoint | None], Array], point: DropoutPoint | None) -> Array:
    """The value of `layer` as it is, its gradient that of the next step's masks."""
    if point is None:
        return layer(None)
    # First the other pass: what is seen of activations is overwritten by the one that follows.
    again = layer(point._replace(step=point.step + 1))
    return lax.stop_gradient(layer(point)) + (again - lax.stop_gradient(again))
