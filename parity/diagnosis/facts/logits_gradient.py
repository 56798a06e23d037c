"""The gradient of the logits made again from the recorded logits and labels, right and with each known mistake.

The gradient of the logits z of a position is a (softmax(z) - e), with e one at its target and zero elsewhere; it is zero where a
position has no target. The factor a is fitted, as other facts are about it: it is one over the loss's divisor. A mistake
of the loss that its rounding hides shows here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity.comparison.pair import NAMES, as_float64
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.factors import MAX_RESIDUAL, explained
from parity.diagnosis.facts.loss import WAYS, late_columns, logits_and_labels
from parity.diagnosis.view import Array, View
from trainspec.data import IGNORED

# The share that rounding may leave of a difference of two gradients that a mistake explains.
MAX_ROUNDED = 0.4
# What the sum of softmax and target leaves in float64.
FINEST = 1e-12
# At most so many elements are looked at: positions are independent of each other.
ELEMENTS = 2**22


class _Mistake(NamedTuple):
    """What the gradient is a sum of, by some factors, if this mistake was made; the second one's factor is its size."""

    kind: str
    terms: Sequence[Array]
    words: str


def made_again(view: View) -> Iterator[Fact]:
    """Of what loss one side's gradient of the logits is, where the logits agree."""
    found = (
        logits_and_labels(view) if (view.phase, view.tensor) == ("activation_gradient", "logits") else None
    )
    if found is None or view.sides is None or view.sides[0].ndim != 3:
        return
    logits, labels = found
    virtual = view.sides[0].shape[1] - labels.shape[1]
    left, right = (np.asarray(side[:, virtual:].any(axis=-1)) for side in view.sides)
    at = examples, positions = _some(left | right, ELEMENTS // logits[0].shape[-1])
    sides = [side[examples, virtual + positions] for side in view.sides]
    scores = [as_float64(side[at]) for side in logits]
    if not all(side.any() for side in sides):
        return
    targets = _moved(labels, 1)[at]
    residuals = [
        _fitted(side, [_gradient(_softmax(z), targets)])[0] for side, z in zip(sides, scores, strict=True)
    ]
    worse = int(np.argmax(residuals))
    if (
        residuals[1 - worse] > max(MAX_RESIDUAL * residuals[worse], view.rounding)
        or residuals[worse] <= FINEST
    ):
        return  # neither is what the logits say, or both are
    near = explained(residuals[worse], view.rounding, MAX_ROUNDED)
    for mistake in _mistakes(scores[worse], labels, at):
        residual, (_, *sizes) = _fitted(sides[worse], mistake.terms)
        if residual <= near and all(size > 0 for size in sizes):
            shown = f" of {sizes[0]:.3g}" if sizes else ""
            yield Fact(
                mistake.kind, f"{NAMES[worse]}'s gradient of the logits is that of {mistake.words}{shown}"
            )
            return


def _some(where: Array, most: int) -> tuple[Array, Array]:
    """(examples, positions) at which `where` is true; at most so many, drawn."""
    examples, positions = np.nonzero(where)
    count = min(len(examples), max(1, most))
    chosen = np.sort(np.random.default_rng(0).choice(len(examples), count, replace=False))
    return examples[chosen], positions[chosen]


def _mistakes(scores: Array, labels: Array, at: tuple[Array, Array]) -> Iterator[_Mistake]:
    """Every known mistake; `scores` are the logits of the positions `at`, [positions, vocabulary]."""
    probabilities = _softmax(scores)
    targets = _moved(labels, 1)[at]
    yield _Mistake(
        "loss-of-shift", [_gradient(probabilities, _moved(labels, 2)[at])], "labels shifted once more"
    )
    yield _Mistake("loss-of-unshifted", [_gradient(probabilities, labels[at])], "labels that are not shifted")
    every = _moved(np.where(labels == IGNORED, 0, labels), 1)[at]
    yield _Mistake(
        "loss-of-every-position", [_gradient(probabilities, every)], "every position, a label or not"
    )
    right, has_target = _gradient(probabilities, targets), (targets != IGNORED)[:, None]
    even = has_target * (probabilities - 1.0 / probabilities.shape[-1]) - right
    yield _Mistake("loss-with-a-term", [right, even], "a loss with label smoothing")
    log_sum = 2.0 * _log_sum(scores) * probabilities * has_target
    yield _Mistake("loss-with-a-term", [right, log_sum], "a loss with a z-loss")
    for ways in WAYS:
        if probabilities.shape[-1] % ways == 0:
            late = _gradient(probabilities, targets, block=probabilities.shape[-1] // ways)
            words = f"targets looked up one column late in all but the first of {ways} shards"
            yield _Mistake("loss-of-late-columns", [late], words)


def _moved(labels: Array, later: int) -> Array:
    """The label that comes so many positions later, at each position."""
    ends = np.full((len(labels), later), IGNORED, labels.dtype)
    return np.concatenate((labels[:, later:], ends), axis=1)


def _log_sum(scores: Array) -> Array:
    """log(sum(exp(z))), [positions, 1]."""
    top = scores.max(axis=-1, keepdims=True)
    return np.log(np.exp(scores - top).sum(axis=-1, keepdims=True)) + top


def _softmax(scores: Array) -> Array:
    """Probabilities, [positions, vocabulary]."""
    return np.exp(scores - _log_sum(scores))


def _gradient(probabilities: Array, targets: Array, block: int | None = None) -> Array:
    """softmax - e, zero where there is no target. In blocks after the first a target is looked up a column late."""
    positions = np.flatnonzero(targets != IGNORED)
    wanted = targets[positions]
    column, is_found = late_columns(wanted, block or probabilities.shape[-1])
    gradient = np.zeros_like(probabilities)
    gradient[positions] = probabilities[positions]
    gradient[positions[is_found], column[is_found]] -= 1.0
    return gradient


def _fitted(side: Array, terms: Sequence[Array]) -> tuple[float, list[float]]:
    """What a sum of the terms by the best factors leaves of `side`, as a share of it; and the factors, those after the first as its multiples."""
    products = np.array([[np.sum(one * other) for other in terms] for one in terms])
    factors = np.linalg.lstsq(products, np.array([np.sum(term * side) for term in terms]), rcond=None)[0]
    left = side - sum(factor * term for factor, term in zip(factors, terms, strict=True))
    first = float(factors[0])
    return (
        float(np.linalg.norm(left) / np.linalg.norm(side)),
        [first, *(float(factor) / first if first else 0.0 for factor in factors[1:])],
    )
