"""A recomputed forward pass that draws other dropout masks."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array, lax

from jaxtrain.dropout import DropoutPoint


def redrawn(layer: Callable[[DropoutPoint | None], Array], point: DropoutPoint | None) -> Array:
    """The value of `layer`, with the gradient that the next step's masks give."""
    if point is None:
        return layer(None)
    # The extra pass comes first, so that the activations it records are overwritten by the real one.
    again = layer(point._replace(step=point.step + 1))
    return lax.stop_gradient(layer(point)) + (again - lax.stop_gradient(again))
