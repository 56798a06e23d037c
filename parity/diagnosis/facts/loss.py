"""The loss made again from the recorded logits and labels, right and with each known mistake."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES, as_float64
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.factors import MAX_RESIDUAL, explained
from parity.diagnosis.facts.numbers import short, width_of
from parity.diagnosis.view import Array, View
from trainspec.data import IGNORED

# The share that rounding may leave of a difference of two losses that a mistake explains, if no other mistake comes as near.
MAX_ROUNDED = 0.25
# A sum of a few bfloat16 numbers has at most so many bits, in a float64 or float32 run.
SUM_BITS = {8: 20, 4: 12}
# Over how many ranks a vocabulary may be split.
WAYS = (2, 4, 8)


def made_again(view: View) -> Iterator[Fact]:
    """What one side's loss is the loss of, where the logits agree."""
    inputs = logits_and_labels(view) if view.phase == "loss" else None
    if inputs is None or view.sides is None:
        return
    logits, labels = inputs
    scores = as_float64(logits[0])
    wanted = _loss(scores[:, :-1], labels[:, 1:])
    sums = view.pair.scalar(view.step, "loss_sum")
    off = [abs(each - wanted) for each in sums]
    worse = int(np.argmax(off))
    exact = MAX_RESIDUAL * off[worse]
    if off[1 - worse] > exact or not off[worse]:
        return  # neither is what the logits say
    name = NAMES[worse]
    rounded = explained(off[worse], view.rounding * abs(wanted), MAX_ROUNDED)
    apart = [(abs(sums[worse] - value), kind, words) for kind, value, words in _mistakes(scores, labels)]
    near = [each for each in apart if each[0] <= rounded]
    if near and (min(near)[0] <= exact or len({kind for _, kind, _ in near}) == 1):
        _, kind, words = min(near)
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


def logits_and_labels(view: View) -> tuple[tuple[Array, Array], Array] | None:
    """Both sides' logits of the step, without those of virtual tokens, and labels; None unless the logits agree.

    Logits are in the types of the traces, [examples, positions, vocabulary]; labels are [examples, positions].
    """
    labels, (left, right) = view.batch("labels"), view.pair.read(view.step, "activation", "logits")
    if labels is None or left is None or right is None or left.shape != right.shape:
        return None
    if left.ndim != 3 or left.shape[1] < labels.shape[1] or not view.agrees("activation", "logits"):
        return None
    tokens = labels.shape[1]
    return (left[:, left.shape[1] - tokens :], right[:, right.shape[1] - tokens :]), labels


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
    column, is_found = late_columns(wanted, block)
    found = np.take_along_axis(rows, column[:, None], axis=-1)[:, 0]
    return float(np.sum(total - np.where(is_found, found, 0.0)))


def late_columns(targets: Array, block: int) -> tuple[Array, Array]:
    """Where targets are looked up if each block of a vocabulary, after the first, is taken to begin a column late; and which are in their block."""
    late = targets // block
    column = targets - late
    return column, column // block == late


def bf16(array: Array) -> Array:
    """Numbers rounded to bfloat16, in float64."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 256.0) / 256.0, exponent)
