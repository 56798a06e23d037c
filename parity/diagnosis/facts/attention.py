"""Attention made again from the recorded queries, keys and values, right and with each known mistake; rotations by angle.

mixed = softmax(scale · q kᵀ + mask) v      [positions, heads, head_dim], of one example at a time
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from parity.comparison.pair import NAMES
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.loss import bf16
from parity.diagnosis.facts.spread import tokens_of
from parity.diagnosis.view import Array, View

# A mistake explains a difference if it leaves less than this share of it; rounding inside a softmax is irregular.
EXPLAINS, OF_A_ROUNDING = 0.02, 0.35
# Enough examples and positions to tell, few enough to be quick.
EXAMPLES, POSITIONS = 4, 256
# The scale is looked for between these powers of e, in so many halvings.
LOG_SCALES, HALVINGS = 4.0, 60
# Frequencies are near each other up to this share: bfloat16's rounding, and float16's is less.
NEAR = 2.0**-8
# By how many heads a mistake may be off.
MOST_SHIFTS = 4
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Inputs:
    """Attention's inputs of one example: queries [S, H, D], keys and values [S, K, D], a prefix [V, K, D], segments [S]."""

    query: Array
    key: Array
    value: Array
    prefix: tuple[Array, Array] | None
    segments: Array


@dataclass(frozen=True)
class Form:
    """One way to do it; the defaults are the contract's."""

    after: int = 0
    padding: bool = False
    documents: bool = True
    prefix: bool = True
    tiled: bool = False
    shifted: int = 0
    first_head: bool = False
    offset: bool = True
    scale: float = 1.0
    rounded: bool = False
    window: int | None = None


def mixed(view: View) -> Iterator[Fact]:
    """Which known mistake makes one side's mixed values of the inputs that both have."""
    if view.phase != "activation" or not view.tensor.endswith(".mixed") or view.sides is None:
        return
    inputs = _inputs(view)
    if not inputs:
        return
    right = [_apply(each, Form()) for each in inputs]
    real = [each.segments > 0 for each in inputs]
    off = [
        math.sqrt(
            sum(
                float(np.sum((side[i, : len(r)] - want)[r] ** 2))
                for i, (want, r) in enumerate(zip(right, real, strict=True))
            )
        )
        for side in view.sides
    ]
    at = int(np.argmax(off))
    if not off[at] or off[1 - at] > EXPLAINS * off[at]:
        return  # neither follows the contract
    wanted = [view.sides[at][i, : len(r)] for i, r in enumerate(real)]
    for kind, form, words in _mistakes(view, inputs, wanted, real):
        limit = OF_A_ROUNDING if form.rounded else EXPLAINS
        if _distance(inputs, form, wanted, real) <= limit * off[at]:
            yield Fact(kind, f"{NAMES[at]}'s mixed values are those of {words}")
            return


def _inputs(view: View) -> list[Inputs]:
    """The inputs of a few examples; none where a point is not recorded or differs."""
    layer, segments = view.tensor.rpartition(".")[0], view.batch("segments")
    arrays = {}
    for name, others in (
        ("query", ("rotated_query", "query_norm", "query")),
        ("key", ("rotated_key", "key_norm", "key")),
        ("value", ("value",)),
    ):
        both = next((b for other in others if (b := view.both("activation", f"{layer}.{other}"))), None)
        if both is None or both[0].ndim != 4:
            return []
        arrays[name] = both[0]
    if segments is None or arrays["query"].shape[1] < segments.shape[1]:
        return []
    cut = arrays["query"].shape[1] - segments.shape[1]
    segments = np.pad(
        segments, ((0, 0), (cut, 0)), constant_values=-1
    )  # virtual tokens, which every token sees
    prefix = [view.both("activation", f"{layer}.prefix_{name}") for name in ("key", "value")]
    found = []
    for i in range(min(EXAMPLES, len(segments))):
        here = slice(0, POSITIONS)
        front = (prefix[0][0][i], prefix[1][0][i]) if prefix[0] and prefix[1] else None
        query, key, value = (arrays[name][i, here] for name in ("query", "key", "value"))
        found.append(Inputs(query, key, value, front, segments[i, here]))
    return found


def _mistakes(
    view: View, inputs: list[Inputs], wanted: list[Array], real: list[Array]
) -> Iterator[tuple[str, Form, str]]:
    """(kind, form, words) of each known mistake, the likeliest first."""
    yield "mix-of-later-keys", Form(after=1), "queries that see the key after them"
    yield "mix-of-later-keys", Form(after=-1), "queries that do not see their own key"
    yield "mix-of-later-keys", Form(after=1 << 30), "queries that see every key"
    yield "mix-of-padding", Form(padding=True), "queries that see padding"
    yield "mix-of-documents", Form(documents=False), "queries that see other documents of the example"
    yield (
        "mix-of-documents",
        Form(documents=False, padding=True),
        "queries that see other documents and padding",
    )
    if any(each.prefix for each in inputs):
        yield "mix-without-prefix", Form(prefix=False), "queries that do not see the prefix"
        yield "mix-without-offset", Form(offset=False), "a causal mask that is not offset by the prefix"
    if inputs[0].query.shape[1] > inputs[0].key.shape[1] > 1:
        yield (
            "mix-of-tiled-heads",
            Form(tiled=True),
            "kv heads in turn (0 1 0 1), where neighbours share one (0 0 1 1)",
        )
    if (kv := inputs[0].key.shape[1]) > 1:
        yield "mix-of-other-heads", Form(first_head=True), "the first kv head for all query heads"
        for by in range(1, min(kv, MOST_SHIFTS + 1)):
            yield "mix-of-other-heads", Form(shifted=by), f"kv heads that are {by} further on"
    tokens = tokens_of(view)
    if tokens is not None and (tokens.differs & (tokens.segments > 0)).any():
        first = int(tokens.numbers()[tokens.differs & (tokens.segments > 0)].min())
        if first > 1:
            yield "mix-of-window", Form(window=first), f"queries that see {first} keys"
    scale = _best_scale(inputs, wanted, real)
    yield "mix-of-scale", Form(scale=scale), f"scores times {scale:.6g}"
    yield "mix-of-bf16", Form(rounded=True), "a softmax of numbers rounded to bfloat16"


def _distance(inputs: list[Inputs], form: Form, wanted: list[Array], real: list[Array]) -> float:
    parts = zip(inputs, wanted, real, strict=True)
    return math.sqrt(sum(float(np.sum((_apply(each, form) - want)[r] ** 2)) for each, want, r in parts))


def _best_scale(inputs: list[Inputs], wanted: list[Array], real: list[Array]) -> float:
    """The scale that leaves least, by golden sections of its logarithm."""
    low, high = -LOG_SCALES, LOG_SCALES

    def left_over(power: float) -> float:
        return _distance(inputs[:2], replace(Form(), scale=math.exp(power)), wanted[:2], real[:2])

    for _ in range(HALVINGS):
        one, other = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, other) if left_over(one) < left_over(other) else (one, high)
    return math.exp((low + high) / 2)


def _apply(inputs: Inputs, form: Form) -> Array:
    """The mixed values [S, H, D] in a form."""
    key, value, prefix = inputs.key, inputs.value, inputs.prefix
    at = np.arange(len(inputs.segments))
    visible = at[:, None] + form.after >= at[None, :]
    if form.window is not None:
        visible &= at[:, None] - at[None, :] < form.window
    of, other = inputs.segments[:, None], inputs.segments[None, :]
    same = (of == other) | (other == -1)
    if not form.documents:
        same = (of > 0) == (other > 0)
    visible &= same | (form.padding & (other == 0))
    if prefix is not None:
        key, value = np.concatenate([prefix[0], key]), np.concatenate([prefix[1], value])
        visible = np.pad(visible, ((0, 0), (len(prefix[0]), 0)), constant_values=form.prefix)
        visible = visible if form.offset else np.tril(visible)
    times, kv = inputs.query.shape[1] // key.shape[1], key.shape[1]
    heads = np.arange(inputs.query.shape[1])
    shared = heads % kv if form.tiled else (heads // times - form.shifted) % kv
    shared = np.zeros_like(shared) if form.first_head else shared
    scores = (
        np.einsum("shd,thd->hst", inputs.query, key[:, shared])
        / math.sqrt(inputs.query.shape[-1])
        * form.scale
    )
    scores = bf16(scores) if form.rounded else scores
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    share = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    share = share / np.maximum(share.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    share = bf16(share) if form.rounded else share
    return np.einsum("hst,thd->shd", share, value[:, shared])


def rotated(view: View) -> Iterator[Fact]:
    """How the angles of two rotations of equal queries or keys differ."""
    if (
        view.phase != "activation"
        or ".rotated_" not in view.tensor
        or view.sides is None
        or view.sides[0].ndim != 4
    ):
        return
    what = view.tensor.rpartition("rotated_")[2]
    layer, segments = view.tensor.rpartition(".")[0], view.batch("segments")
    before = view.both("activation", f"{layer}.{what}_norm") or view.both("activation", f"{layer}.{what}")
    if before is None or segments is None or before[0].shape != view.sides[0].shape:
        return
    cut = before[0].shape[1] - segments.shape[1]
    real = np.pad(segments > 0, ((0, 0), (cut, 0)), constant_values=True)
    still = [
        np.abs(was - turned)[real].max() <= view.allowed
        for was, turned in zip(before, view.sides, strict=True)
    ]
    if still[0] != still[1]:
        kept = "queries" if what == "query" else "keys"
        yield Fact("not-rotated", f"{NAMES[0 if still[0] else 1]} does not rotate {kept}")
        return
    pairs = [_angles(before[0][real], side[real]) for side in view.sides]
    bent = [each is None for each in pairs]
    if bent[0] != bent[1]:
        name = NAMES[0 if bent[0] else 1]
        interleaved = _angles(_by_pairs(before[0][real]), _by_pairs(view.sides[0 if bent[0] else 1][real]))
        words = (
            "neighbouring features"
            if interleaved is not None
            else "something else than the two halves of a head"
        )
        yield Fact("other-pairs", f"{name} rotates {words} against each other")
        return
    if bent[0]:  # by both: a GLM's way, neighbours in a part of the head
        width = _rotated_width(before[0][real], [side[real] for side in view.sides], view.allowed)
        of_pairs = _by_pairs(before[0][real][..., :width])
        pairs = [_angles(of_pairs, _by_pairs(side[real][..., :width])) for side in view.sides]
    if pairs[0] is None or pairs[1] is None:
        return
    apart = np.angle(np.exp(1j * (pairs[1] - pairs[0])))
    if np.abs(apart - apart[:1]).max() <= 1e-6:  # the same at every token
        yield Fact(
            "angle-offset", f"right's {what} is rotated by a constant number of positions more or less"
        )
        return
    off = np.flatnonzero(np.abs(apart).max(axis=0) > 1e-9)
    yield Fact(
        "other-frequencies",
        f"angles differ in {len(off)} of {apart.shape[1]} frequencies, by another number at each position",
    )
    positions = view.batch("positions")
    if positions is not None and not cut and (share := _of_frequencies(apart, pairs[0], positions[real])):
        yield Fact("near-frequencies", f"frequencies differ by {share:.1e} of themselves at most")


def _rotated_width(before: Array, sides: list[Array], allowed: float) -> int:
    """How many features at the beginning of a head are turned by either side, an even number."""
    changed = np.any([np.abs(side - before).max(axis=(0, 1)) > allowed for side in sides], axis=0)
    last = int(np.flatnonzero(changed)[-1]) if changed.any() else -1
    return last + 1 + (last + 1) % 2


def _of_frequencies(apart: Array, angles: Array, positions: Array) -> float | None:
    """By what share of themselves frequencies differ, if at most by `NEAR`; the angles at position 1 are the frequencies."""
    frequencies = np.abs(angles[positions == 1][:1])
    if not len(frequencies) or not frequencies.all():
        return None
    later = positions >= 1
    share = float((np.abs(apart[later]) / positions[later, None] / frequencies).max())
    return share if share <= NEAR else None


def swapped_prefix(view: View) -> Iterator[Fact]:
    """Whether one side's keys of the prefix are the other's values."""
    layer, _, point = view.tensor.rpartition(".")
    if view.phase != "activation" or point != "prefix_key" or view.sides is None:
        return
    values = view.both("activation", f"{layer}.prefix_value")
    if values is None or values[0].shape != view.sides[0].shape:
        return
    if max(np.abs(view.sides[i] - values[1 - i]).max(initial=0.0) for i in (0, 1)) <= view.allowed:
        yield Fact("swapped", "one side's keys of the prefix are the other's values")


def _by_pairs(array: Array) -> Array:
    """Neighbouring features as two halves."""
    return np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)


def _angles(before: Array, after: Array) -> Array | None:
    """[tokens, pairs]: by what each pair of the first head is turned; None if it is not only turned."""
    x, y = (np.split(side[:, 0], 2, axis=-1) for side in (before, after))
    one, other = x[0] + 1j * x[1], y[0] + 1j * y[1]
    if np.abs(np.abs(one) - np.abs(other)).max() > 1e-4 * np.abs(one).max():
        return None
    return np.angle(other * np.conj(one))
