"""The loss and its gradient made again from the recorded logits and labels, right and with each known mistake.

The gradient of the logits z of a position is a (softmax(z) - e), with e one at its target, and zero where it has none. The factor a
is the loss's divisor, which other facts are about: it is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.numbers import short, width_of
from parity.diagnosis.view import Array, View
from trainspec.data import IGNORED

# A loss is what it is made again as, if the two agree to the first share of what is to be explained; or the second, if rounding
# explains the rest.
EXPLAINS, MAX_ROUNDED = 0.02, 0.4
# A sum of a few bfloat16 numbers has at most so many bits, in a float64 or float32 run.
SUM_BITS = {8: 20, 4: 12}
# At most so many elements of the logits' gradient are looked at.
ELEMENTS = 2**22
# Over how many ranks a vocabulary may be split.
WAYS = (2, 4, 8)


def made_again(view: View) -> Iterator[Fact]:
    """What one side's loss is the loss of, where the logits agree."""
    inputs = _inputs(view) if view.phase == "loss" else None
    if inputs is None or view.sides is None:
        return
    (scores, _), labels = inputs
    wanted = _loss(scores[:, :-1], labels[:, 1:])
    sums = view.pair.scalar(view.step, "loss_sum")
    off = [abs(each - wanted) for each in sums]
    worse = int(np.argmax(off))
    if off[1 - worse] > EXPLAINS * off[worse] or not off[worse]:
        return  # neither is what the logits say
    name, near = (
        NAMES[worse],
        max(EXPLAINS * off[worse], min(view.rounding * abs(wanted), MAX_ROUNDED * off[worse])),
    )
    for kind, value, words in _mistakes(scores, labels):
        if abs(sums[worse] - value) <= near:
            yield Fact(
                kind,
                f"{name}'s loss, {sums[worse]:.6g}, is that of {words} on the same logits ({wanted:.6g} without)",
            )
            return
    bits = SUM_BITS[width_of(view)]
    digits = [short(np.asarray(each), bits) for each in sums]
    if digits[worse] and not digits[1 - worse]:
        yield Fact(
            "loss-of-bf16",
            f"{name}'s loss, {sums[worse]:.6g}, is a sum of bfloat16 numbers; the logits make {wanted:.9g}",
        )
        return
    yield Fact("loss-off", f"{name}'s loss is {sums[worse]:.6g}, its logits and labels make {wanted:.6g}")


def gradient_made_again(view: View) -> Iterator[Fact]:
    """What loss one side's gradient of the logits is of, where the logits agree."""
    inputs = _inputs(view) if (view.phase, view.tensor) == ("activation_gradient", "logits") else None
    if inputs is None or view.sides is None or view.sides[0].ndim != 3:
        return
    scores, labels = inputs
    # Each position is by itself, so that some are enough.
    at = np.linspace(0, labels.size - 1, min(labels.size, ELEMENTS // scores[0].shape[-1] + 1)).astype(int)
    rows, columns = np.unravel_index(at, labels.shape)
    sides = [side[rows, columns + side.shape[1] - labels.shape[1]] for side in view.sides]
    chances = [_softmax(own[rows, columns]) for own in scores]
    shifted = _moved(labels, 1)[rows, columns]
    rests = [_rest(side, [_gradient(own, shifted)])[0] for side, own in zip(sides, chances, strict=True)]
    worse = int(np.argmax(rests))
    if rests[1 - worse] > max(EXPLAINS * rests[worse], view.rounding):
        return  # neither is what the logits say
    near = max(EXPLAINS * rests[worse], min(view.rounding, MAX_ROUNDED * rests[worse]))
    some = scores[worse][rows, columns]
    top = some.max(axis=-1, keepdims=True)
    totals = np.log(np.exp(some - top).sum(axis=-1, keepdims=True)) + top
    for kind, parts, words in _gradient_mistakes(chances[worse], totals, labels, (rows, columns)):
        rest, (_, *shares) = _rest(sides[worse], parts)
        if rest <= near and all(share > 0 for share in shares):
            shown = f" of {shares[0]:.3g}" if shares else ""
            yield Fact(kind, f"{NAMES[worse]}'s gradient of the logits is that of {words}{shown}")
            return


def _gradient_mistakes(
    chances: Array, totals: Array, labels: Array, at: tuple[Array, Array]
) -> Iterator[tuple[str, list[Array], str]]:
    """(kind, arrays whose sum the gradient is by some factors, words) of each known mistake.

    `chances` are softmax(z) of the positions `at`, `totals` the logarithms of their denominators.
    """
    shifted = _moved(labels, 1)[at]
    yield "loss-of-shift", [_gradient(chances, _moved(labels, 2)[at])], "labels shifted once more"
    yield "loss-of-unshifted", [_gradient(chances, labels[at])], "labels that are not shifted"
    every = _moved(np.where(labels == IGNORED, 0, labels), 1)[at]
    yield "loss-of-every-position", [_gradient(chances, every)], "every position, a label or not"
    right, counts = _gradient(chances, shifted), (shifted != IGNORED)[:, None]
    flat = counts * (chances - 1.0 / chances.shape[-1]) - right
    yield "loss-with-a-term", [right, flat], "a loss with label smoothing"
    yield "loss-with-a-term", [right, counts * totals * chances], "a loss with a z-loss"
    for ways in WAYS:
        if chances.shape[-1] % ways == 0:
            late = _gradient(chances, shifted, block=chances.shape[-1] // ways)
            words = f"targets looked up one column late in all but the first of {ways} shards"
            yield "loss-of-late-columns", [late], words


def _inputs(view: View) -> tuple[list[Array], Array] | None:
    """Both sides' logits of the step, without those of virtual tokens, and labels; None unless the logits agree."""
    labels, logits = view.batch("labels"), view.both("activation", "logits")
    if labels is None or logits is None or logits[0].ndim != 3 or logits[0].shape[1] < labels.shape[1]:
        return None
    if not view.agrees("activation", "logits"):
        return None
    return [side[:, side.shape[1] - labels.shape[1] :] for side in logits], labels


def _moved(labels: Array, places: int) -> Array:
    """The label that comes so many places later, at each position."""
    ends = np.full((len(labels), places), IGNORED, labels.dtype)
    return np.concatenate((labels[:, places:], ends), axis=1)


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _gradient(chances: Array, targets: Array, block: int | None = None) -> Array:
    """softmax - e, zero where there is no target. In blocks after the first a target is looked up a column late."""
    rows = np.flatnonzero(targets != IGNORED)
    wanted = targets[rows]
    column = wanted if block is None else wanted - wanted // block
    found = np.ones(len(wanted), bool) if block is None else column // block == wanted // block
    gradient = np.zeros_like(chances)
    gradient[rows] = chances[rows]
    gradient[rows[found], column[found]] -= 1.0
    return gradient


def _rest(side: Array, parts: list[Array]) -> tuple[float, list[float]]:
    """What is left of an array when it is fitted by a sum of others, as a share of it; and the first's factor, the others' to it."""
    squares = np.array([[np.sum(one * other) for other in parts] for one in parts])
    factors = np.linalg.lstsq(squares, np.array([np.sum(one * side) for one in parts]), rcond=None)[0]
    size = float(np.linalg.norm(side))
    fitted = sum(factor * part for factor, part in zip(factors, parts, strict=True))
    first = float(factors[0])
    shares = [float(each) / first if first else 0.0 for each in factors[1:]]
    return (float(np.linalg.norm(side - fitted)) / size if size else 0.0), [first, *shares]


def _mistakes(scores: Array, labels: Array) -> Iterator[tuple[str, float, str]]:
    """(kind, loss, words) of each known mistake."""
    yield "loss-of-shift", _loss(scores[:, :-2], labels[:, 2:]), "labels shifted once more"
    yield "loss-of-unshifted", _loss(scores, labels), "labels that are not shifted"
    counted = np.where(labels == IGNORED, 0, labels)
    ended = np.pad(counted[:, 1:], ((0, 0), (0, 1)))
    yield "loss-of-every-position", _loss(scores[:, :-1], counted[:, 1:]), "every position, a label or not"
    yield "loss-of-every-position", _loss(scores, ended), "every position, a label or not"
    yield "loss-of-bf16", _loss(bf16(scores)[:, :-1], labels[:, 1:]), "logits rounded to bfloat16"
    for ways in WAYS:
        if scores.shape[-1] % ways == 0:
            late = _loss(scores[:, :-1], labels[:, 1:], block=scores.shape[-1] // ways)
            yield (
                "loss-of-late-columns",
                late,
                f"targets looked up one column late in all but the first of {ways} shards",
            )


def _loss(scores: Array, targets: Array, block: int | None = None) -> float:
    """The sum of cross-entropies over targets that count. In blocks after the first a target is looked up a column late."""
    at = targets != IGNORED
    rows, wanted = scores[at], targets[at]
    top = rows.max(axis=-1, initial=-np.inf)
    total = np.log(np.exp(rows - top[:, None]).sum(axis=-1)) + top
    if block is None:
        return float(np.sum(total - np.take_along_axis(rows, wanted[:, None], axis=-1)[:, 0]))
    late = wanted // block
    column = wanted - late
    found = np.take_along_axis(rows, column[:, None], axis=-1)[:, 0]
    return float(np.sum(total - np.where(column // block == late, found, 0.0)))


def bf16(array: Array) -> Array:
    """Numbers rounded to bfloat16, in float64."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 256.0) / 256.0, exponent)
