"""What methods with virtual tokens share: how a batch looks with them, and the linear layers of their encoders.

An encoder is whole on every device and runs once for a pass, as it knows no example. What it gives has the type that
gradients are summed in: the sum over examples and microbatches is made in that, and is rounded once on its way back. So
has the trained embedding that it begins with: the gradient of that is not rounded at all.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxtrain.layers import VIRTUAL, Build, Dim, Linear
from jaxtrain.weights import Arrays
from trainspec.data import IGNORED
from trainspec.methods import Method, leading_rows, virtual_tokens


def all_rows(batch: Arrays, method: Method) -> Arrays:
    """A batch [..., S] as it is for the layers, with rows [..., N + S] where a prompt stands in front; ids stay S."""
    return batch | {
        "positions": all_positions(batch["positions"], method),
        "segments": all_segments(batch["segments"], method),
        "labels": all_labels(batch["labels"], method),
    }


def all_positions(positions: Array, method: Method) -> Array:
    """Positions of a layer's rows, from those of the tokens in their documents."""
    moved = positions + virtual_tokens(method)
    return _with_leading(jnp.arange(leading_rows(method)), moved)


def all_labels(labels: Array, method: Method) -> Array:
    """Labels of a layer's rows: a virtual token is nobody's target."""
    return _with_leading(jnp.full(leading_rows(method), IGNORED), labels)


def all_segments(segments: Array, method: Method) -> Array:
    """Segments of a layer's rows: the virtual ones have one of their own, which all documents see."""
    return _with_leading(jnp.full(leading_rows(method), VIRTUAL), segments)


def _with_leading(row_N: Array, x: Array) -> Array:
    repeated = jnp.broadcast_to(row_N.astype(x.dtype), (*x.shape[:-1], len(row_N)))
    return jnp.concatenate([repeated, x], axis=-1)


def linear_layers(*sizes: int, build: Build) -> nnx.Dict[Linear]:
    """Linear layers by their numbers in a torch.nn.Sequential that has a non-linearity after each but the last."""

    def constrain(x: Array, axes: tuple[str, ...]) -> Array:
        return build.constrain(x, ("virtual", "hidden"))

    whole = build._replace(constrain=constrain)
    dims = [Dim("hidden", size) for size in sizes]
    return nnx.Dict(
        {
            str(2 * i): Linear(inner, outer, bias=True, stack=(), build=whole)
            for i, (inner, outer) in enumerate(pairwise(dims))
        }
    )
