"""Whether rounding explains that a token was chosen, from the float64 reference's logits before it.

A side whose logits are those of the reference, each moved by no more than rounding moves it, chooses token c only where

greedy   no other token is above c by more than the difference of the two may move: s_v - s_c <= D(c, v) for every v.
drawn    the drawn number u, which both sides have to the last bit, is within reach of c's stretch of the cumulative
         probabilities: F(c - 1) - B <= u <= F(c) + B. Where a filter (top-k, top-p, min-p) may keep a token or not, as its
         logit is within rounding of the filter's edge, this is asked of every set of tokens that may be kept.

In fp64 each logit may move by FP64_TOLERANCE of the largest, so D is twice that, and B is what that makes of F:
2 F (1 - F) / temperature of it. Elsewhere both are measured: with the logits' movements in the draws of the reference,

    D(c, v) = T(V) · U(ν) · the larger of the root mean square of the movement of s_c - s_v, and √2 σ
    B(j)    = T(2) · U(ν) · the larger of the root mean square of the movement of F(j), and what independent movements of σ make
              of it: σ / temperature · √(Σ p_i² (1[i <= j] - F(j))²)

where σ is the root mean square movement of all V logits about their mean (a movement that all share changes no choice), ν is
EFFECTIVE_DOF for each draw, and T and U are those of `measured_bounds`. Scores are those after the repetition penalty, which moves
a logit's error as it moves the logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parity.comparison.estimated_bounds import EFFECTIVE_DOF, gaussian_max_quantile
from parity.comparison.measured_bounds import rms_lower_factor
from parity.comparison.tolerance import FP64_TOLERANCE
from trainspec.generation.choice import Sampling, probabilities, softmax

Array = NDArray[Any]
# Tokens at a filter's edge of which every subset is tried. Of more, c's stretch reaches as far as any subset puts it.
MOST_UNSURE = 6
# Roundings of a cumulative sum in float64, and of the drawn number's product with it.
SUM_ROUNDING = 1e-12


class Movement(Protocol):
    """How far rounding moves the scores of one position."""

    def of_difference(self, token: int) -> Array:
        """D [V]: by how much the token's score and each other's may come nearer or further apart."""
        ...

    def of_boundaries(self, shares_V: Array, kept_V: Array, temperature: float) -> Array:
        """B [V]: how far the cumulative sums of `shares_V`, those of the `kept_V` tokens, may move."""
        ...


@dataclass(frozen=True)
class FixedMovement:
    """That of fp64."""

    scores_V: Array

    @property
    def _each(self) -> float:
        return FP64_TOLERANCE * float(np.abs(self.scores_V).max())

    def of_difference(self, token: int) -> Array:
        """As `Movement`."""
        return np.full(len(self.scores_V), 2 * self._each)

    def of_boundaries(self, shares_V: Array, kept_V: Array, temperature: float) -> Array:
        """As `Movement`."""
        cumulative_V = np.cumsum(shares_V)
        return 2 * cumulative_V * (1 - cumulative_V) * self._each / temperature + SUM_ROUNDING


@dataclass(frozen=True)
class MeasuredMovement:
    """That of a narrower type: `scores_V` of the reference and `drawn_DV` of its draws."""

    scores_V: Array
    drawn_DV: Array

    @cached_property
    def _moved_DV(self) -> Array:
        return self.drawn_DV - self.scores_V

    @cached_property
    def _sigma(self) -> float:
        moved_DV = self._moved_DV
        return float(np.sqrt(np.mean(np.square(moved_DV - moved_DV.mean(axis=1, keepdims=True)))))

    @property
    def _margin(self) -> float:
        return rms_lower_factor(EFFECTIVE_DOF * len(self.drawn_DV))

    def of_difference(self, token: int) -> Array:
        """As `Movement`."""
        moved_DV = self._moved_DV
        apart_V = np.sqrt(np.mean(np.square(moved_DV - moved_DV[:, token, None]), axis=0))
        typical = math.sqrt(2.0) * self._sigma
        return gaussian_max_quantile(len(self.scores_V)) * self._margin * np.maximum(apart_V, typical)

    def of_boundaries(self, shares_V: Array, kept_V: Array, temperature: float) -> Array:
        """As `Movement`."""
        cumulative_V, squares_V = np.cumsum(shares_V), np.cumsum(np.square(shares_V))
        spread_V = squares_V * np.square(1 - cumulative_V)
        spread_V += (squares_V[-1] - squares_V) * np.square(cumulative_V)
        independent_V = self._sigma / temperature * np.sqrt(spread_V)
        drawn_DV = np.where(kept_V, self.drawn_DV / temperature, -np.inf)
        moved_DV = np.array([np.cumsum(softmax(each)) for each in drawn_DV]) - cumulative_V
        own_V = np.sqrt(np.mean(np.square(moved_DV), axis=0))
        return gaussian_max_quantile(2) * self._margin * np.maximum(own_V, independent_V) + SUM_ROUNDING


@dataclass(frozen=True)
class Reach:
    """How far a token is from being chosen, against how far rounding may move that.

    Greedy, in logits: how far the token is below the best. Drawn, in probability: how far the drawn number is outside
    of the token's stretch.
    """

    distance: float
    bound: float

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains the choice."""
        return self.distance <= self.bound


def reach(token: int, scores_V: Array, movement: Movement, sampling: Sampling, drawn: float) -> Reach:
    """Whether rounding explains the choice of `token` from these scores; `drawn` is the number in [0, 1) of its position."""
    if not sampling.is_greedy:
        return _of_draw(token, scores_V, movement, sampling, drawn)
    above_V, bound_V = scores_V - scores_V[token], movement.of_difference(token)
    worst = int(np.argmax(above_V - bound_V))
    if above_V[worst] <= bound_V[worst]:  # explained: what the nearest rival says of it
        worst = int(scores_V.argmax())
    return Reach(float(above_V[worst]), float(bound_V[worst]))


def _of_draw(token: int, scores_V: Array, movement: Movement, sampling: Sampling, drawn: float) -> Reach:
    filters = (sampling.top_k, sampling.top_p, sampling.min_p)
    kept_V = np.ones(len(scores_V), bool)
    if any(each is not None for each in filters):
        kept_V = probabilities(scores_V, sampling) > 0
    if kept_V[token]:
        own = _outside(drawn, *_stretch(token, scores_V, kept_V, movement, sampling))
        if own.is_explained:
            return own
    unsure = np.flatnonzero(_unsure(scores_V, kept_V, movement, sampling))
    if not kept_V[token] and token not in unsure:
        return Reach(math.inf, 0.0)
    others = [int(i) for i in unsure if i != token]
    if len(others) > MOST_UNSURE:
        sets = _furthest(kept_V, token, others)
        low = min((_stretch(token, scores_V, kept, movement, sampling) for kept in sets), key=lambda s: s[0])
        high = max((_stretch(token, scores_V, kept, movement, sampling) for kept in sets), key=lambda s: s[1])
        return _outside(drawn, low[0], high[1], max(low[2], high[2]))
    reaches = []
    for count in range(len(others) + 1):
        for some in combinations(others, count):
            kept = kept_V.copy()
            kept[others] = False
            kept[[token, *some]] = True
            reaches.append(_outside(drawn, *_stretch(token, scores_V, kept, movement, sampling)))
    return min(reaches, key=lambda r: r.distance - r.bound)


def _outside(drawn: float, low: float, high: float, bound: float) -> Reach:
    return Reach(max(low - drawn, drawn - high, 0.0), bound)


def _furthest(kept_V: Array, token: int, unsure: list[int]) -> list[Array]:
    """The two sets of kept tokens that put the token's stretch lowest and highest."""
    sets = []
    for is_low in (True, False):
        kept = kept_V.copy()
        kept[unsure] = [(i > token) == is_low for i in unsure]
        kept[token] = True
        sets.append(kept)
    return sets


def _stretch(
    token: int, scores_V: Array, kept_V: Array, movement: Movement, sampling: Sampling
) -> tuple[float, float, float]:
    """The cumulative probabilities before and after a token where those tokens are kept, and how far these may move."""
    shares_V = softmax(np.where(kept_V, scores_V / sampling.temperature, -np.inf))
    cumulative_V = np.cumsum(shares_V)
    bound_V = movement.of_boundaries(shares_V, kept_V, sampling.temperature)
    before, bound = (cumulative_V[token - 1], bound_V[token - 1]) if token else (0.0, 0.0)
    return float(before), float(cumulative_V[token]), float(max(bound, bound_V[token]))


def _unsure(scores_V: Array, kept_V: Array, movement: Movement, sampling: Sampling) -> Array:
    """True [V] for tokens that a filter may keep or not, as rounding will have it."""
    unsure_V = np.zeros(len(scores_V), bool)
    if kept_V.all():
        return unsure_V
    lowest = int(np.where(kept_V, scores_V, np.inf).argmin())
    highest = int(np.where(kept_V, -np.inf, scores_V).argmax())
    # Two near each other on both sides of the edge may change their order.
    unsure_V |= kept_V & (scores_V - scores_V[highest] <= movement.of_difference(highest))
    unsure_V |= ~kept_V & (scores_V[lowest] - scores_V <= movement.of_difference(lowest))
    if sampling.top_p is not None and sampling.top_p < 1.0:
        before = Sampling(temperature=sampling.temperature, top_k=sampling.top_k)
        shares_V = probabilities(scores_V, before)
        order_V = np.argsort(scores_V, kind="stable")
        bound_V = np.empty(len(scores_V))
        bound_V[order_V] = _in_order(movement, order_V, shares_V, sampling.temperature)
        below_V = np.empty(len(scores_V))
        below_V[order_V] = np.cumsum(shares_V[order_V])
        unsure_V |= (shares_V > 0) & (np.abs(below_V - (1.0 - sampling.top_p)) <= bound_V)
    if sampling.min_p is not None and sampling.min_p > 0:
        best = int(scores_V.argmax())
        edge = scores_V[best] + sampling.temperature * math.log(sampling.min_p)
        unsure_V |= np.abs(scores_V - edge) <= movement.of_difference(best)
    return unsure_V


def _in_order(movement: Movement, order_V: Array, shares_V: Array, temperature: float) -> Array:
    """How far the cumulative sums of the shares may move when they are summed in another order."""
    match movement:
        case MeasuredMovement(scores_V, drawn_DV):
            ordered: Movement = MeasuredMovement(scores_V[order_V], drawn_DV[:, order_V])
        case _:
            ordered = movement
    return ordered.of_boundaries(shares_V[order_V], shares_V[order_V] > 0, temperature)
