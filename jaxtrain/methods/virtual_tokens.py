"""What methods with virtual tokens share: a batch's arrays with them, and the linear layers of their encoders.

An encoder is replicated and runs once per pass, as its output is the same for every example. The output has the type that
gradients are summed in: so its gradient is summed over examples and microbatches in that type, and rounded once. The
trained embedding that it starts from has that type too, so its gradient is never rounded.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxtrain.layers import VIRTUAL, Build, Dim, Linear
from jaxtrain.weights import Arrays
from trainspec.data import IGNORED
from trainspec.methods import Method, leading_positions, position_shift


def with_virtual_tokens(batch: Arrays, method: Method) -> Arrays:
    """A batch [..., S] as layers see it: [..., N + S] with a prompt's virtual tokens in front; input ids stay [..., S]."""
    return batch | {
        "positions": all_positions(batch["positions"], method),
        "segments": all_segments(batch["segments"], method),
        "labels": all_labels(batch["labels"], method),
    }


def all_positions(positions: Array, method: Method) -> Array:
    """Positions [..., N + S]: those of tokens are moved by the number of virtual tokens, also of a prefix that has positions."""
    moved = positions + position_shift(method)
    return _with_leading(jnp.arange(leading_positions(method)), moved)


def all_labels(labels: Array, method: Method) -> Array:
    """Labels [..., N + S]: a virtual token is no target."""
    return _with_leading(jnp.full(leading_positions(method), IGNORED), labels)


def all_segments(segments: Array, method: Method) -> Array:
    """Segments [..., N + S]: virtual tokens have one of their own, which all others see."""
    return _with_leading(jnp.full(leading_positions(method), VIRTUAL), segments)


def _with_leading(leading_N: Array, x: Array) -> Array:
    repeated = jnp.broadcast_to(leading_N.astype(x.dtype), (*x.shape[:-1], len(leading_N)))
    return jnp.concatenate([repeated, x], axis=-1)


def linear_layers(*sizes: int, build: Build) -> nnx.Dict[Linear]:
    """Replicated linear layers, by their indices in a torch.nn.Sequential with a non-linearity after each but the last."""

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
