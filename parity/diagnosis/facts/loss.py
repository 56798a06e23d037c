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
    sides = [side[:, side.shape[1] - labels.shape[1] :] for side in view.sides]
    chances = [np.exp(own - own.max(axis=-1, keepdims=True)) for own in scores]
    chances = [own / own.sum(axis=-1, keepdims=True) for own in chances]
    shifted = _moved(labels, 1)
    rests = [_rest(side, [_gradient(own, shifted)])[0] for side, own in zip(sides, chances, strict=True)]
    worse = int(np.argmax(rests))
    if rests[1 - worse] > max(EXPLAINS * rests[worse], view.rounding):
        return  # neither is what the logits say
    near = max(EXPLAINS * rests[worse], min(view.rounding, MAX_ROUNDED * rests[worse]))
    for kind, columns, words in _gradient_mistakes(scores[worse], chances[worse], labels):
        rest, (_, *shares) = _rest(sides[worse], columns)
        if rest <= near and all(share > 0 for share in shares):
            shown = f" of {shares[0]:.3g}" if shares else ""
            yield Fact(kind, f"{NAMES[worse]}'s gradient of the logits is that of {words}{shown}")
            return


def _gradient_mistakes(
    scores: Array, chances: Array, labels: Array
) -> Iterator[tuple[str, list[Array], str]]:
    """(kind, arrays whose sum the gradient is by some factors, words) of each known mistake."""
    shifted = _moved(labels, 1)
    right, counts = _gradient(chances, shifted), (shifted != IGNORED)[..., None]
    yield "loss-of-shift", [_gradient(chances, _moved(labels, 2))], "labels shifted once more"
    yield "loss-of-unshifted", [_gradient(chances, labels)], "labels that are not shifted"
    every = np.where(shifted == IGNORED, 0, shifted)
    every[:, -1] = IGNORED
    yield "loss-of-every-position", [_gradient(chances, every)], "every position, a label or not"
    flat = counts * (chances - 1.0 / chances.shape[-1]) - right
    yield "loss-with-a-term", [right, flat], "a loss with label smoothing"
    total = np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    yield "loss-with-a-term", [right, counts * total * chances], "a loss with a z-loss"
    for ways in WAYS:
        if chances.shape[-1] % ways == 0:
            late = _gradient(chances, shifted, block=chances.shape[-1] // ways)
            yield (
                "loss-of-late-columns",
                [late],
                f"targets looked up one column late in all but the first of {ways} shards",
            )


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


def _gradient(chances: Array, targets: Array, block: int | None = None) -> Array:
    """softmax - e, zero where there is no target. In blocks after the first a target is looked up a column late."""
    at = targets != IGNORED
    gradient = np.where(at[..., None], chances, 0.0)
    rows, columns = np.nonzero(at)
    wanted = targets[at]
    column = wanted if block is None else wanted - wanted // block
    found = np.ones(len(wanted), bool) if block is None else column // block == wanted // block
    gradient[rows[found], columns[found], column[found]] -= 1.0
    return gradient


def _rest(side: Array, columns: list[Array]) -> tuple[float, list[float]]:
    """What is left of an array when it is fitted by others, as a share of it; and the first's factor, of the others to the first's."""
    matrix = np.stack([column.ravel() for column in columns], axis=1)
    factors = np.linalg.lstsq(matrix.T @ matrix, matrix.T @ side.ravel(), rcond=None)[0]
    size = float(np.linalg.norm(side))
    rest = float(np.linalg.norm(side.ravel() - matrix @ factors)) / size if size else 0.0
    return rest, [
        float(factors[0]),
        *(float(each / factors[0]) if factors[0] else 0.0 for each in factors[1:]),
    ]


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
