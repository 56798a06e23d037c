"""Clipping and AdamW exactly as torch computes them, as an optax transformation.

optax's own differ: its clipping has no 1e-6, and it computes the bias correction in float32, where 1 - 0.999 has three
digits fewer than in torch's doubles.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxtrain.precision import accumulation_dtype
from jaxtrain.weights import Arrays
from trainspec.recipe import AdamW

# torch.nn.utils.clip_grad_norm_ and DeepSpeed clip by max / (norm + 1e-6).
CLIP_EPS = 1e-6


class Moments(NamedTuple):
    """AdamW's running means of the gradient and of its square."""

    moment1: Arrays
    moment2: Arrays


class Rates(NamedTuple):
    """The scalars of one update, computed in Python doubles: the learning rate, and 1 - beta**t for both betas."""

    lr: float
    correction1: float
    correction2: float


def rates(spec: AdamW, *, lr: float, step: int) -> Rates:
    """The scalars of an update; `step` counts from 0."""
    return Rates(lr, 1 - spec.betas[0] ** (step + 1), 1 - spec.betas[1] ** (step + 1))


def global_norm(gradients: Arrays) -> Array:
    """The norm of all tensors as one vector, summed in the accumulation type."""
    wide = (g.astype(accumulation_dtype(g.dtype)) for g in gradients.values())
    return jnp.sqrt(sum((jnp.sum(jnp.square(g)) for g in wide), start=jnp.zeros(())))


def clip(gradients: Arrays, norm: Array, *, max_norm: float) -> Arrays:
    """Every gradient times min(1, max_norm / (norm + 1e-6))."""
    factor = jnp.minimum(1.0, max_norm / (norm + CLIP_EPS))
    return jax.tree.map(lambda g: g * factor, gradients)


def make_optimizer(spec: AdamW, decayed: Set[str]) -> optax.GradientTransformationExtraArgs:
    """AdamW: p -= lr * (m / c1 / (sqrt(v / c2) + eps) + decay * p), with decay for the names in `decayed` only.

    Source: arXiv 1711.05101, as in torch.optim.AdamW. `update` takes `rates` as an extra argument.
    Differs from torchtrain: clipping is a function of its own, there DeepSpeed does it.
    """
    beta1, beta2 = spec.betas

    def init(weights: Arrays) -> Moments:
        return Moments(jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights))

    def update(
        gradients: Arrays, moments: Moments, weights: Arrays | None = None, *, rates: Rates, **_: Any
    ) -> tuple[Arrays, Moments]:
        assert weights is not None  # for decoupled weight decay
        moment1 = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments.moment1, gradients)
        moment2 = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, moments.moment2, gradients)

        def delta(name: str) -> Array:
            root = jnp.sqrt(moment2[name]) / jnp.sqrt(rates.correction2) + spec.eps
            step = -(rates.lr / rates.correction1) * (moment1[name] / root)
            return step - rates.lr * spec.weight_decay * weights[name] if name in decayed else step

        return {name: delta(name) for name in weights}, Moments(moment1, moment2)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
