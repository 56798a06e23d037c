"""The bounds of two traces in fp32 and bf16: what rounding adds in each phase, given what the phase inherits.

A phase is judged on the difference it *adds*. The differences it inherits (of weights, gradients, moments) have been
judged at earlier locations; they are read from the traces and carried through this phase's own arithmetic, element by
element. u is the unit roundoff (2^-24 for fp32); p, a (`adam.fit_moment`: keep, take) and r (`adam.fit_update`) are fitted:

gradient   T(N) · sqrt(2) · u · k · max|g|  +  drift · max|g|
           A contraction of n products rounds n times. In a sum of terms of random sign the partial sums grow
           as sqrt(i), so the squared errors add up to u² n²/2 against a result of size sqrt(n): a relative
           error of u sqrt(n/2) (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5), without their safety factor),
           and one more rounding to store it. Independent errors add in squares along the longest path, each
           carried on with factor one: k² = sum of (1 + n/2) over the contractions of the forward and the
           backward pass (`path_roundings`), those of an encoder of virtual tokens included. Two sides: sqrt(2).
           The largest of N such errors, with one false alarm in a million tensors: T(N) = sqrt(2 ln(2N / 1e-6)).
           The tensor as a whole: V(ν) · sqrt(2) · u · k · |g|, and drift · |g|, in Frobenius norms. Its squared
           distance has at least ν = EFFECTIVE_DOF degrees of freedom and exceeds V² times its mean once in a million.
drift      The change of a gradient caused by the distance of the two sides' weights (`network_drift`): a module whose
           weight differs by a share d changes what passes through it by d, forward and backward, so 2 · sum(d). The
           model is linear (weights drift by what each update adds, nothing is amplified) and valid far below 1.
moment1    p |Δm before| + a |Δg| + a |g| (R - 1) + 14u (p |m before| + a |g|)
           The clip factor follows the norm; R is the larger norm divided by the smaller. Seven roundings per side:
           clip factor 2, its product with g 1, 1 - beta and its product 2, difference and sum 2.
moment2    p |Δv before| + a |Δg²| + a g² (R² - 1) + 20u (p v before + a g²)
           Ten roundings per side: those of the clipped gradient 3 twice, its square 1, 1 - beta and its product 2, the sum 1.
update     r · min(|Δm|/s + |m| |Δs|/s², |m|/s of both) + 8u (|update| of both) + 3u (|weight| of both) + lr |Δw|
           with s = sqrt(moment2): Adam's derivative (eps only makes it smaller), capped by the largest update that
           Adam can make. Eight roundings per side: both bias corrections and their quotients 4, root, eps, quotient
           and lr 4; three more at the size of the weight (`tolerance.WEIGHT_ROUNDINGS`). decay · lr ≤ lr.
           Where s is rounding noise the bound reaches the update itself, and that element is undetermined.
slot, update of another rule than Adam's: `optimizers`. A moment of a coarser type: 2 units of it at its size, and the
           update inherits as much.
change     of a target network that goes the share t of the way to a trained weight w, from x:
           t (|Δw| + |Δx|) + 3u (|x| + t |w|) of both. Of any other (a running statistic): the forward pass's rounding, at
           the size of the largest x or change, drift at the same size, |Δx|, and 3u |x| of both. Integers: zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parity.comparison.adam import (
    MOMENTS,
    clip_condition,
    fit_moment,
    fit_update,
    float64_sides,
    gradient_and_before,
)
from parity.comparison.drift import network_drift, partner_drift
from parity.comparison.optimizers import (
    has_moments,
    other_types,
    slot_bound,
    stored_unit,
    update_bound,
)
from parity.comparison.pair import Pair, as_float64
from parity.comparison.phases import Location
from parity.comparison.structure import Structure
from parity.comparison.tolerance import (
    EXACT_PHASES,
    FLOAT32_TINY,
    UNIT,
    WEIGHT_ROUNDINGS,
    Bound,
    CheckedPair,
    as_a_whole,
    is_counter,
    largest,
    rate_gap,
    rate_tolerance,
)
from parity.comparison.untrained import followed_weight
from trainspec.methods import ENCODER

Array = NDArray[Any]

FALSE_ALARM = 1e-6
# Both sides together, as counted above.
MOMENT_ROUNDINGS = {"moment1": 14, "moment2": 20}
# Pointwise roundings of one layer: rotation 3, scaling 1, softmax 2, two residual sums 2, SiLU and product 3, two norms 4;
# the backward pass has as many.
POINTWISE = 15
# Those of one LSTM step: sums of the gates 2, their non-linearities 4, two products and a sum 3, tanh and product 2.
POINTWISE_OF_CELL = 11
# Effective degrees of freedom of a tensor's movement, per draw: 2 mean² / variance of its squared norm. Over 12 draws of
# step 3 of the demo recipe the smallest of 16 tensors was 6.8, the median some 30.
EFFECTIVE_DOF = 6
# Phases that are judged element by element only, not as a whole tensor.
ELEMENTWISE_PHASES = (
    *EXACT_PHASES,
    "lr",
    "loss",
    "grad_norm",
    "clip",
    "moment1",
    "moment2",
    "slot",
    "update",
    "change",
)


class EstimatedBounds:
    """Bounds of two runs in `precision`, estimated from their traces alone; inherited differences are read from `pair`.

    A trace does not record what a low-rank product is multiplied by; `lora_scale` defaults to PEFT's alpha / rank = 8 / 8.
    """

    def __init__(
        self,
        pair: Pair,
        precision: Literal["fp32", "bf16"],
        *,
        lora_scale: float = 1.0,
        notes: Sequence[str] = (),
    ) -> None:
        self._pair = pair
        self.notes = (*notes, *_unknown_rule(pair))
        self._stored, self._summed = UNIT[precision], UNIT["fp32"]
        shapes = pair.starting_shapes()
        self._vocab = vocabulary(shapes)
        ids = pair.read(pair.first_step, "batch", "input_ids")[0]
        self._forward, self._both_passes = path_roundings(
            shapes,
            ids.shape if ids is not None and ids.ndim == 2 else (1, 1),
            structure=pair.structure,
            stored=self._stored,
            summed=self._summed,
        )
        self._drift = cache(lambda step: network_drift(pair, step, lora_scale=lora_scale))
        self._moment_fit = cache(lambda phase, step: fit_moment(pair, phase, step))
        self._update_fit = cache(lambda step: fit_update(pair, step))

    def incomparable(self, location: Location, left: Array, right: Array) -> str | None:
        """Two traces may have different types, but for state that one side rounds to a coarser one."""
        return other_types(location, left, right)

    def checked_pairs(self, location: Location, left: Array, right: Array) -> Sequence[CheckedPair]:
        """Left against right; what the forward and backward passes produce also as a whole tensor."""
        elementwise = CheckedPair(left, right, self.bound(location, left, right))
        if location.phase in ELEMENTWISE_PHASES:
            return (elementwise,)
        norm = float(max(np.linalg.norm(left), np.linalg.norm(right)))
        rounding = math.sqrt(2.0) * rms_upper_factor(EFFECTIVE_DOF) * math.sqrt(self._both_passes)
        own = rounding * norm + FLOAT32_TINY * math.sqrt(left.size)
        return elementwise, as_a_whole(
            left, right, Bound(np.asarray(own), self._weight_drift(location) * norm)
        )

    def bound(self, location: Location, left: Array, right: Array) -> Bound:
        """The bound of the location's phase, as derived in the module docstring."""
        match location.phase:
            case phase if phase in EXACT_PHASES:
                return Bound(self._conversion(location) * np.maximum(abs(left), abs(right)))
            case "lr":
                return Bound(np.asarray(rate_tolerance(float(left), float(right)) * largest(left, right)))
            case "loss":
                return self._loss(location)
            case "grad_norm":
                return self._norm(location.step)
            case "clip":
                return self._clip(location.step, largest(left, right))
            case "moment1" | "moment2":
                return self._moment(location, left, right)
            case "slot" if is_counter(self._pair, location):
                return Bound(np.zeros(()))
            case "slot":
                return slot_bound(self._pair, location, left, right, drift=self._drift(location.step))
            case "update" if not has_moments(self._pair, location.step, location.tensor):
                return update_bound(self._pair, location, left, right)
            case "update":
                return self._update(location, left, right)
            case "change":
                return self._change(location, left, right)
            case _:
                return self._gradient(location, largest(left, right), left.size)

    def _conversion(self, location: Location) -> float:
        """Zero, or one rounding if the sides store the starting weight in different types."""
        if location.phase != "initial":
            return 0.0
        left, right = self._pair.forms(0, "weight", location.tensor)
        return 0.0 if left is not None and right is not None and left.dtype == right.dtype else self._stored

    def _loss(self, location: Location) -> Bound:
        """The forward pass's rounding of the logits, plus what the distance of the weights causes: |gradient| · |Δw|.

        A token's loss is a log-sum-exp of logits, which spread over at least ln(vocab) once a model has learned
        anything. The relative error of the logits applies to that and to the loss itself.
        """
        tokens = self._pair.scalar(location.step, "tokens")[0]
        mean = max(abs(loss) for loss in self._pair.scalar(location.step, "loss"))
        rounding = (
            math.sqrt(2.0)
            * gaussian_max_quantile(1)
            * math.sqrt(self._forward)
            * (mean + math.log(self._vocab))
        )
        moved = 0.0
        for name, (left, right) in self._pair.weights(location.step).items():
            gradient = self._pair.read(location.step, "gradient", name)[0]
            if gradient is not None and gradient.shape == left.shape:
                moved += float(np.sum(np.abs(as_float64(gradient)) * np.abs(left - right)))
        count = tokens if location.tensor == "loss_sum" else 1.0
        return Bound(np.asarray(rounding * count), moved * count)

    def _gradient(self, location: Location, scale: float, size: int) -> Bound:
        rounding = math.sqrt(2.0) * gaussian_max_quantile(size) * math.sqrt(self._both_passes)
        return Bound(np.asarray(rounding * scale + FLOAT32_TINY), self._weight_drift(location) * scale)

    def _weight_drift(self, location: Location) -> float:
        """The share by which the distance of the weights changes a gradient or an activation."""
        return self._drift(location.step) + partner_drift(self._pair, location.step, location.tensor)

    def _norm(self, step: int) -> Bound:
        """What the difference of the gradients explains, and the rounding of one long sum of squares."""
        squares, count = np.zeros(2), 0
        for name in self._pair.names(step, "gradient"):
            for side, gradient in enumerate(self._pair.read(step, "gradient", name)):
                if gradient is not None:
                    squares[side] += float(np.sum(np.square(as_float64(gradient))))
                    count = max(count, gradient.size)
        norms = np.sqrt(squares)
        own = 2 * self._summed * math.sqrt(1 + count / 2) * float(norms.max())
        return Bound(np.asarray(own), float(abs(norms[0] - norms[1])))

    def _clip(self, step: int, scale: float) -> Bound:
        """The factor follows the norm; it is fitted to the moments, whose roundings `_moment` counts."""
        norms = self._pair.scalar(step, "grad_norm")
        inherited = abs(norms[0] - norms[1]) / max(*norms, FLOAT32_TINY) * scale
        unit = max(
            self._summed,
            *(
                stored_unit(self._pair, Location(step, m, n))
                for m in MOMENTS
                for n in self._pair.names(step, m)
            ),
        )
        own = MOMENT_ROUNDINGS["moment1"] * unit * clip_condition(self._pair, step) * scale
        return Bound(np.asarray(own), inherited)

    def _moment(self, location: Location, left: Array, right: Array) -> Bound:
        power = 1 if location.phase == "moment1" else 2
        keep, take = self._moment_fit(location.phase, location.step)
        gradient, before = gradient_and_before(self._pair, location)
        new = [np.abs(side) ** power for side in gradient]
        moved = keep * abs(before[0] - before[1]) + take * abs(gradient[0] ** power - gradient[1] ** power)
        norms = self._pair.scalar(location.step, "grad_norm")
        clip = (max(*norms, FLOAT32_TINY) / max(min(norms), FLOAT32_TINY)) ** power - 1.0
        size = keep * np.maximum(*np.abs(before)) + take * np.maximum(*new)
        stored = 2 * stored_unit(self._pair, location) * np.maximum(abs(left), abs(right))
        return Bound(
            MOMENT_ROUNDINGS[location.phase] * self._summed * size + stored + FLOAT32_TINY,
            moved + clip * take * np.maximum(*new),
        )

    def _update(self, location: Location, left: Array, right: Array) -> Bound:
        rate = self._update_fit(location.step)
        moment1 = float64_sides(self._pair.read(location.step, "moment1", location.tensor), left)
        moment2 = float64_sides(self._pair.read(location.step, "moment2", location.tensor), left)
        root = np.maximum(np.sqrt(np.abs(moment2)), math.sqrt(FLOAT32_TINY))
        units = [stored_unit(self._pair, Location(location.step, m, location.tensor)) for m in MOMENTS]
        linear = abs(moment1[0] - moment1[1]) / root[0]
        linear += np.abs(moment1[1]) * abs(root[0] - root[1]) / (root[0] * root[1])
        # A moment stored in a coarser type hides the difference of those that the update was made of.
        linear += 2 * (units[0] + units[1] / 2) * np.abs(moment1[1]) / root[0]
        moved = rate * np.minimum(linear, np.sum(np.abs(moment1) / root, axis=0))
        weights = self._pair.weights(location.step).get(location.tensor, (np.zeros(()), np.zeros(())))
        rounded = 8 * self._summed * (abs(left) + abs(right))
        rounded += WEIGHT_ROUNDINGS * self._summed * (abs(weights[0]) + abs(weights[1]))
        rates = self._pair.scalar(location.step, "lr")
        moved = moved + rate_gap(*rates) * np.maximum(abs(left), abs(right))
        return Bound(rounded + FLOAT32_TINY, moved + max(rates) * abs(weights[0] - weights[1]))

    def _change(self, location: Location, left: Array, right: Array) -> Bound:
        if is_counter(self._pair, location):
            return Bound(np.zeros(()))
        weights = self._pair.weights(location.step)
        before = weights.get(location.tensor, (np.zeros(()), np.zeros(())))
        apart, size = abs(before[0] - before[1]), abs(before[0]) + abs(before[1])
        if follows := followed_weight(self._pair, location, left):
            name, share = follows
            updates = float64_sides(self._pair.read(location.step, "update", name), left)
            after = weights[name][0] + updates[0], weights[name][1] + updates[1]
            size = size + share * (abs(after[0]) + abs(after[1]))
            moved = share * (abs(after[0] - after[1]) + apart)
            return Bound(WEIGHT_ROUNDINGS * self._summed * size + FLOAT32_TINY, moved)
        scale = max(largest(left, right), largest(*before))
        rounding = math.sqrt(2.0) * gaussian_max_quantile(left.size) * math.sqrt(self._forward)
        own = rounding * scale + WEIGHT_ROUNDINGS * self._summed * size
        return Bound(own + FLOAT32_TINY, self._drift(location.step) * scale + apart)


def _unknown_rule(pair: Pair) -> list[str]:
    """A note if weights have no Adam moments: what their updates are held to."""
    if not pair.common_steps:
        return []
    moments = pair.names(pair.first_step, MOMENTS[0]) & pair.names(pair.first_step, MOMENTS[1])
    others = sorted(pair.names(pair.first_step, "update") - moments)
    if not others:
        return []
    return [
        f"{len(others)} of the weights, such as {others[0]}, have no moment1 and moment2, so their optimizer's rule is not "
        "known: their updates are held to what the differences of gradients and slots explain at most, under the most "
        "sensitive rule that fits them"
    ]


def path_roundings(
    shapes: Mapping[str, tuple[int, ...]],
    batch: tuple[int, ...],
    *,
    structure: Structure,
    stored: float,
    summed: float,
) -> tuple[float, float]:
    """Squared relative error (u² k²) of the forward pass alone, and of forward and backward pass to a gradient.

    Read from the shapes of the weights: a matrix [out, in] sums over `in` forward and over `out` backward, a convolution
    [out, in, *window] over `in` and `out` at each place of its window, a norm over its width; attention's scores sum over a head, its softmax and its values over the sequence; the
    head's softmax over the vocabulary; a weight's own gradient over the tokens of the batch (`batch` is its shape,
    [examples, sequence_tokens]). Parallel matrices are counted as if in sequence: an over-estimate. `structure` tells
    embeddings from other matrices and counts the layers. Virtual tokens lengthen the sequence, and their encoder's
    matrices come before all others.
    """
    encoder = {name: shape for name, shape in shapes.items() if name.startswith(f"{ENCODER}.")}
    model = {name: shape for name, shape in shapes.items() if name not in encoder}
    virtual = encoder.get(f"{ENCODER}.embedding.weight", (0,))[0]
    examples, sequence = batch[0], batch[1] + virtual
    widths = [shape[0] for shape in model.values() if len(shape) == 1]
    width, vocab = max(widths, default=1), vocabulary(model)
    layers = structure.num_layers(model)
    matrices = [s for name, s in model.items() if len(s) >= 2 and structure.role(name) != "embedding"]
    encoded = _in_encoder(encoder, virtual)
    forward = [math.prod(shape[1:]) for shape in (*encoded, *matrices)] + widths
    forward += layers * [width, sequence, sequence] + [vocab]
    backward = [math.prod((shape[0], *shape[2:])) for shape in (*encoded, *matrices)] + widths
    backward += layers * [width, sequence, sequence, sequence, sequence] + [vocab, examples * sequence]
    cells = virtual * sum(".weight_hh_" in name for name in encoder)

    def squared(lengths: list[int]) -> float:
        pointwise = layers * POINTWISE + cells * POINTWISE_OF_CELL
        return (len(lengths) + pointwise) * stored**2 + sum(lengths) / 2 * summed**2

    return squared(forward), squared(forward) + squared(backward)


def vocabulary(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size of the vocabulary: the longest first dimension of the model's weights."""
    sizes = [s[0] for name, s in shapes.items() if s and not name.startswith(f"{ENCODER}.")]
    return max(sizes, default=1)


def _in_encoder(encoder: Mapping[str, tuple[int, ...]], virtual: int) -> list[tuple[int, ...]]:
    """[out, in] of every product of an encoder in sequence; an LSTM's recurrent ones once per virtual token.

    A bias counts as two products of length 1: one sum, and the non-linearity after it.
    """
    products: list[tuple[int, ...]] = []
    for name, shape in encoder.items():
        if name != f"{ENCODER}.embedding.weight":
            times = virtual if ".weight_hh_" in name else 1
            products += times * [shape] if len(shape) == 2 else 2 * [(1, 1)]
    return products


def gaussian_max_quantile(size: int) -> float:
    """The largest of `size` normal errors, in standard deviations, exceeds this once in a million."""
    return math.sqrt(2.0 * math.log(2.0 * max(size, 1) / FALSE_ALARM))


def rms_upper_factor(dof: int) -> float:
    """The factor by which a root mean square of `dof` (even) normal values comes out too large, once in a million.

    P(χ² > 2h) = exp(-h) · sum of h^k / k! over k < dof / 2; solved for h by bisection.
    """
    low, high = 0.0, 100.0 + dof
    for _ in range(100):
        half = (low + high) / 2
        above = math.exp(-half) * sum(half**k / math.factorial(k) for k in range(dof // 2))
        low, high = (half, high) if above > FALSE_ALARM else (low, half)
    return math.sqrt(2 * high / dof)
