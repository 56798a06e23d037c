"""Simulated roundings: the float64 model computes as if every result were stored in a narrower type, for `parity`'s bounds.

Inside `simulate` every result that goes through `rounded` is moved up or down by one rounding, and so is its cotangent in
the backward pass. As in hardware, the direction is a function of the value: it is a hash of its bits and of the draw, so
equal results of one operation move alike and no generator is needed. Outside `simulate` nothing is added to a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
from jax import Array, lax

from trainspec.runs.contract import RoundingKind, Roundings

# Odd 32-bit constants: the golden ratio's, and those of a hash by Ellis (lowbias32).
_NEXT_OPERATION = 0x9E3779B9
_MIX_HIGH, _MIX_1, _MIX_2 = 0x85EBCA6B, 0x7FEB352D, 0x846CA68B


@dataclass(frozen=True)
class _Simulation:
    sizes: Roundings
    key: Array
    operations: Iterator[int]


_active: ContextVar[_Simulation | None] = ContextVar("simulated roundings", default=None)


@contextmanager
def simulate(sizes: Roundings, key: Array) -> Iterator[None]:
    """Trace what follows with roundings of `sizes`; `key` (uint32) is another for each draw and step."""
    token = _active.set(_Simulation(sizes, key, count(1)))
    try:
        yield
    finally:
        _active.reset(token)


def rounded(x: Array, kind: RoundingKind = "stored") -> Array:
    """x [...], where roundings are simulated as rounded to the type that such results have."""
    simulation = _active.get()
    if simulation is None:
        return x
    key = simulation.key + jnp.uint32(next(simulation.operations) * _NEXT_OPERATION % 2**32)
    return _rounded(simulation.sizes.of(kind), x, key)


def softmax(scores: Array) -> Array:
    """Softmax over the last dimension of scores [..., S].

    Where roundings are simulated the denominator is rounded, and so the sum of its backward pass, which all S share.
    """
    if _active.get() is None:
        return jax.nn.softmax(scores, axis=-1)
    shifted = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return shifted / rounded(jnp.sum(shifted, axis=-1, keepdims=True), "wide")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(size: float, x: Array, key: Array) -> Array:
    return _moved(size, x, key)


def _forward(size: float, x: Array, key: Array) -> tuple[Array, Array]:
    return _moved(size, x, key), key


def _backward(size: float, key: Array, dx: Array) -> tuple[Array, None]:
    return _moved(size, dx, ~key), None


_rounded.defvjp(_forward, _backward)


def _moved(size: float, x: Array, key: Array) -> Array:
    """x (1 ± size), x float64; zeros stay zero."""
    words = lax.bitcast_convert_type(x, jnp.uint32)
    mixed = (words[..., 0] ^ (words[..., 1] * jnp.uint32(_MIX_HIGH))) + key
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_MIX_1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_MIX_2)
    return jnp.where(mixed >> 31 == 1, x * (1 + size), x * (1 - size))
