"""Simulated roundings: the float64 model computes as if every result were stored in a narrower type, for `parity`'s bounds.

Inside `simulate` every result that goes through `rounded` is moved by one rounding, and so is its cotangent in the backward
pass; the factors and the result of a contraction are moved by the roundings of its partial sums (`Sums`). Outside `simulate`
nothing is added to a program.

Partial sums, and results of the type that sums are made in, are moved up or down at random. As in hardware the direction is a
function of the value: a hash of its bits and of the draw, so equal results of one operation move alike and no generator is needed.

A result stored in a narrower type than sums are made in is rounded once, and coarsely. It is rounded to nearest, to the numbers
of that type times the draw's `scale`: so near results move alike, and what is too small beside a stored number is lost in the sum
with it, as in a run. Random directions would show neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from trainspec.step import RMS_ROUNDING, RoundingKind, Roundings

# Odd 32-bit constants: the golden ratio's, and those of murmur3's and Chris Wellons's (lowbias32) hashes.
_NEXT_OPERATION = 0x9E3779B9
_MIX_HIGH, _MIX_1, _MIX_2 = 0x85EBCA6B, 0x7FEB352D, 0x846CA68B
# Multiples of it, modulo 1, are spread evenly over [0, 1) however many there are: the golden ratio's fraction.
_GOLDEN = 0.6180339887498949
_FLOAT64_BITS = 53
# A movement that is a smaller share than this of another one of the same array is left out.
_NEGLIGIBLE = 0.01


@partial(jax.tree_util.register_dataclass, data_fields=("word", "scale"), meta_fields=())
@dataclass(frozen=True)
class Draw:
    """What sets one draw apart: `word` (uint32), another for each draw and step, and `scale` in [1, 2), that of its numbers."""

    word: Array
    scale: Array

    @classmethod
    def numbered(cls, number: int, word: int) -> Draw:
        """Draw `number` from 0. The numbers of draw 0 are those of the type itself."""
        return cls(jnp.uint32(word), jnp.float64(2.0 ** (number * _GOLDEN % 1.0)))


@dataclass(frozen=True)
class _Simulation:
    sizes: Roundings
    draw: Draw
    operations: Iterator[int]


class Sums(NamedTuple):
    """Of how many terms the contractions are that an array is a factor in or the result of, and those of its cotangent.

    Terms of size u each are summed to s one after the other, and every partial sum is rounded. In a random order that ends at s,
    the square of the i-th is (i s / n)² and, for how far it strays from that line, i (n - i) / n times the mean square of the
    terms. Over all i that is n / 3 s² and n / 6 Σ terms². So the result is moved by u √(n/3) and, in place of every term, one of
    its factors by u √(n/6). Where the terms have random signs s² is Σ terms², and both together are u √(n/2) of that; where
    they have one sign the first is the larger by far, and no movement of single terms would show it.
    """

    factor: int = 0
    total: int = 0
    back_factor: int = 0
    back_total: int = 0


NO_SUMS = Sums()

_active: ContextVar[_Simulation | None] = ContextVar("simulated roundings", default=None)


@contextmanager
def simulate(sizes: Roundings, draw: Draw) -> Iterator[None]:
    """Trace what follows with roundings of `sizes`."""
    token = _active.set(_Simulation(sizes, draw, count(1)))
    try:
        yield
    finally:
        _active.reset(token)


def is_simulated() -> bool:
    """Whether roundings are simulated where this is called."""
    return _active.get() is not None


def rounded(x: Array, kind: RoundingKind = "stored", *, terms: int = 0, sums: Sums = NO_SUMS) -> Array:
    """x [...], where roundings are simulated as rounded to the type that such results have.

    `terms` is how many positive terms x is the sum of, whose partial sums are rounded too; `sums` the contractions around it.
    """
    simulation = _active.get()
    if simulation is None:
        return x
    partial_sums = simulation.sizes.wide * math.sqrt(terms / 2)
    forward, back = (
        _movement(simulation.sizes, kind, math.hypot(partial_sums, size))
        for size in _of_sums(simulation.sizes, sums)
    )
    return _moved_both_ways((forward, back), x, _next_draw(simulation))


def gradient_rounded(x: Array) -> Array:
    """x [...], whose cotangent alone is rounded, where roundings are simulated, as a stored result."""
    simulation = _active.get()
    if simulation is None:
        return x
    return _moved_both_ways((_STILL, _movement(simulation.sizes, "stored")), x, _next_draw(simulation))


def in_sums(x: Array, sums: Sums) -> Array:
    """x [...], where roundings are simulated moved as the partial sums of these contractions are rounded."""
    simulation = _active.get()
    if simulation is None:
        return x
    forward, back = (_Movement(random=size) for size in _of_sums(simulation.sizes, sums))
    return _moved_both_ways((forward, back), x, _next_draw(simulation))


@partial(jax.tree_util.register_dataclass, data_fields=("draw",), meta_fields=("sizes",))
@dataclass(frozen=True)
class Contraction:
    """What a `custom_vjp` is given to simulate the roundings of its own contractions."""

    sizes: Roundings
    draw: Draw

    def factor(self, x: Array, terms: int | Array, number: int) -> Array:
        """x as a factor in contractions of `terms` terms; `number` is another for each movement of the operation."""
        return _moved_at_random(self.sizes.wide * (terms / 6) ** 0.5, x, self._word_of(number))

    def total(self, x: Array, terms: int, number: int) -> Array:
        """x as the stored result of contractions of `terms` terms."""
        movement = _movement(self.sizes, "stored", self.sizes.wide * (terms / 3) ** 0.5)
        return _moved(movement, x, replace(self.draw, word=self._word_of(number)))

    def gradient(self, x: Array, terms: int | Array, number: int) -> Array:
        """x as the result of contractions of `terms` terms that is the gradient of a weight."""
        of_total = self.sizes.wide**2 * (terms / 3)
        return _moved_at_random((of_total + self.sizes.summed**2) ** 0.5, x, self._word_of(number))

    def _word_of(self, number: int) -> Array:
        return self.draw.word ^ jnp.uint32(number * _MIX_1 % 2**32)


def contraction() -> Contraction | None:
    """That of the next operation; None where no roundings are simulated."""
    simulation = _active.get()
    return None if simulation is None else Contraction(simulation.sizes, _next_draw(simulation))


def softmax(scores: Array) -> Array:
    """Softmax over the last dimension of scores [..., S].

    Where roundings are simulated the denominator is rounded, and so the sum of its backward pass, which all S share.
    """
    if _active.get() is None:
        return jax.nn.softmax(scores, axis=-1)
    shifted = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    denominator = rounded(jnp.sum(shifted, axis=-1, keepdims=True), "wide", terms=scores.shape[-1])
    return shifted / denominator


def read_again(mixed_BQKGD: Array, scores_BKGQS: Array) -> Array:
    """What attention makes of its scores, where roundings are simulated with those of the stored value in the backward pass.

    The backward pass of the softmax takes from every score's cotangent their mean under the shares, the same for all S. A fused
    kernel computes that mean as the product of the output with its cotangent (FlashAttention, arXiv 2205.14135, appendix B.4), from
    the *stored* output. Where scores are nearly uniform the mean is all but equal to what it is taken from, and its error remains.
    The value is left as it is: the movement is times a zero whose derivative by the scores is the shares.
    """
    simulation = _active.get()
    if simulation is None:
        return mixed_BQKGD
    stored = _moved(_movement(simulation.sizes, "stored"), mixed_BQKGD, _next_draw(simulation))
    moved = stored - mixed_BQKGD
    log_sum = jnp.moveaxis(jax.nn.logsumexp(scores_BKGQS, axis=-1), -1, 1)[..., None]
    return mixed_BQKGD + lax.stop_gradient(moved) * (log_sum - lax.stop_gradient(log_sum))


def _next_draw(simulation: _Simulation) -> Draw:
    word = simulation.draw.word + jnp.uint32(next(simulation.operations) * _NEXT_OPERATION % 2**32)
    return replace(simulation.draw, word=word)


class _Movement(NamedTuple):
    """Root mean squares of an array's relative movements: of a rounding to nearest, and of one up or down at random."""

    nearest: float = 0.0
    random: float = 0.0


_STILL = _Movement()


def _movement(sizes: Roundings, kind: RoundingKind, partial_sums: float = 0.0) -> _Movement:
    """That of results of a kind, which are sums whose partial sums move them by as much."""
    size = sizes.of(kind)
    if size <= sizes.wide:
        return _Movement(random=math.hypot(size, partial_sums))
    return _Movement(size, partial_sums if partial_sums > _NEGLIGIBLE * size else 0.0)


def _of_sums(sizes: Roundings, sums: Sums) -> tuple[float, float]:
    """By how much an array is moved, and its cotangent."""
    forward, back = sums.factor / 6 + sums.total / 3, sums.back_factor / 6 + sums.back_total / 3
    return sizes.wide * math.sqrt(forward), sizes.wide * math.sqrt(back)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moved_both_ways(movements: tuple[_Movement, _Movement], x: Array, draw: Draw) -> Array:
    """x moved by the first of `movements`, its cotangent by the second."""
    return _moved(movements[0], x, draw)


def _forward(movements: tuple[_Movement, _Movement], x: Array, draw: Draw) -> tuple[Array, Draw]:
    return _moved(movements[0], x, draw), draw


def _backward(movements: tuple[_Movement, _Movement], draw: Draw, dx: Array) -> tuple[Array, None]:
    return _moved(movements[1], dx, replace(draw, word=~draw.word)), None


_moved_both_ways.defvjp(_forward, _backward)


def _moved(movement: _Movement, x: Array, draw: Draw) -> Array:
    moved = _moved_at_random(movement.random, x, draw.word)
    return _to_nearest(movement.nearest, moved, draw.scale) if movement.nearest else moved


def _to_nearest(size: float, x: Array, scale: Array) -> Array:
    """x rounded to the nearest of the numbers with as many bits as roundings of `size` speak of, times `scale`; x float64.

    With the sum of a number and 2^s times itself all but its last s bits are left (Veltkamp 1968, Dekker 1971).
    """
    bits = round(-math.log2(size / RMS_ROUNDING))
    scaled = x / scale
    spread = scaled * (2.0 ** (_FLOAT64_BITS - bits) + 1)
    return (spread - (spread - scaled)) * scale


def _moved_at_random(size: float | Array, x: Array, word: Array) -> Array:
    """x (1 ± size), x float64; zeros stay zero."""
    if isinstance(size, float) and size == 0:
        return x
    words = lax.bitcast_convert_type(x, jnp.uint32)
    mixed = (words[..., 0] ^ (words[..., 1] * jnp.uint32(_MIX_HIGH))) + word
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_MIX_1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_MIX_2)
    return jnp.where(mixed >> 31 == 1, x * (1 + size), x * (1 - size))
