"""How an error is spread over examples, positions, documents, heads and features, and what has moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity.diagnosis.fact import Fact
from parity.diagnosis.view import QUIET, TOKEN_WISE, Array, View, operation

# An error is said to grow with the position from this rank correlation on.
GROWS = 0.6
POSITIONS = 8
# "From position n on" is said from this n on, and of so many of the later positions; a lower n is said otherwise.
FIRST_POSITION = 3
MOST = 0.8
ALL_BUT_FEW = 0.95
# A difference that is one vector at every token leaves less than this share of it.
SAME = 1e-3


@dataclass(frozen=True)
class Tokens:
    """The largest error at each token, [examples, tokens], what differs there and what agrees.

    `alive` is where either side is not zero and the token is no padding: only there an error can be. `front` has the same of
    virtual tokens.
    """

    error: Array
    differs: Array
    quiet: Array
    alive: Array
    segments: Array
    front: Array

    def numbers(self) -> Array:
        """The position of each token in its document, from 0; that of padding has no meaning."""
        number = np.arange(self.segments.shape[-1])
        begins = np.pad(np.diff(self.segments, axis=1) != 0, ((0, 0), (1, 0)))
        return number - np.maximum.accumulate(np.where(begins, number, 0), axis=1)

    def last(self) -> Array:
        """Where the last token of each document is."""
        after = np.pad(self.segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return (after != self.segments) & (self.segments > 0)


def tokens_of(view: View) -> Tokens | None:
    """The errors by token, None for what has no tokens. Virtual tokens come before the real ones."""
    segments = view.batch("segments")
    if view.phase not in TOKEN_WISE or view.sides is None or segments is None or segments.ndim != 2:
        return None
    left, right = view.sides
    if left.ndim < 3 or left.shape[0] != segments.shape[0] or left.shape[1] < segments.shape[1]:
        return None
    error = np.abs(left - right).reshape(*left.shape[:2], -1).max(axis=-1)
    size = np.maximum(abs(left), abs(right)).reshape(*left.shape[:2], -1).max(axis=-1)
    cut = left.shape[1] - segments.shape[1]
    limit = min(view.allowed, QUIET * float(error.max(initial=0.0)))
    own = error[:, cut:]
    alive = (size[:, cut:] > 1e-12 * size.max(initial=0.0)) & (segments > 0)
    return Tokens(own, own > view.allowed, own <= limit, alive, segments, error[:, :cut] > view.allowed)


def examples(view: View) -> Iterator[Fact]:
    """Which examples differ, and whose they are."""
    tokens = tokens_of(view)
    if tokens is None or not (tokens.differs.any() or tokens.front.any()):
        return
    real = tokens.segments > 0
    has_padding = np.asarray(~real.all(axis=1))
    if tokens.front.any() and tokens.quiet.all():
        yield Fact("only-virtual", "only virtual tokens differ")
        return
    if not real.all() and tokens.quiet[real].all():
        yield Fact("only-padding", "only padded positions differ")
        return
    wrong = np.asarray((tokens.differs & real).any(axis=1))
    right = np.asarray((tokens.quiet | ~real).all(axis=1)) & tokens.alive.any(axis=1)
    if wrong.any() and right.any() and (wrong | right | ~tokens.alive.any(axis=1)).all():
        if has_padding[wrong].all() and not has_padding[right].any():
            yield Fact("only-padded-examples", "only examples that have padding differ")
        yield Fact("only-some-examples", f"only examples {_ranges(wrong)} differ")
        rows = set(np.flatnonzero(wrong))
        if view.replicas > 1 and any(set(each) == rows for each in view.rows_of_replicas()):
            yield Fact("rows-of-a-replica", f"examples {_ranges(wrong)} are those of one replica")
        if len(view.slices()) > 1 and any(set(each) >= rows for each in view.slices()):
            yield Fact("rows-of-a-slice", f"examples {_ranges(wrong)} are in one slice or microbatch")
    alive = tokens.alive
    if alive.any() and tokens.differs[alive].mean() >= ALL_BUT_FEW:
        yield Fact("every-token", "every token differs")


def documents(view: View) -> Iterator[Fact]:
    """Where in a document the error begins and ends. Not of gradients: what has no label has none, whatever is wrong."""
    tokens = tokens_of(view)
    if tokens is None or view.phase != "activation" or not (tokens.differs & (tokens.segments > 0)).any():
        return
    real, at, last = tokens.segments > 0, tokens.numbers(), tokens.last()
    later = tokens.segments > 1
    if later.any() and tokens.quiet[real & ~later].all() and (tokens.differs & later).any():
        yield Fact("only-later-documents", "only what follows a document's boundary differs")
        return
    begins = real & (at == 0)
    if tokens.quiet[begins].all() and tokens.differs[real & ~begins].mean() >= 0.5:
        yield Fact("first-tokens-agree", "the first token of every document agrees, later ones differ")
    long = real & last & (at > 0)
    if long.any() and tokens.quiet[long].all() and tokens.differs[real & ~last].mean() >= 0.5:
        yield Fact("last-tokens-agree", "the last token of every document agrees, earlier ones differ")
    yield from _along(tokens, real, at)


def _along(tokens: Tokens, real: Array, at: Array) -> Iterator[Fact]:
    """How the error depends on the position in the document."""
    numbers = np.unique(at[real])
    if len(numbers) < POSITIONS:
        return
    quiet = np.array([tokens.quiet[real & (at == n)].all() for n in numbers])
    wrong = np.array([tokens.differs[real & (at == n)].mean() >= 0.5 for n in numbers])
    start = int(np.argmin(quiet))
    if start >= FIRST_POSITION and not quiet[start] and wrong[start:].mean() >= MOST:
        yield Fact(
            "from-position",
            f"positions below {numbers[start]} of a document agree, from there on they differ",
        )
        return
    means = np.array([tokens.error[real & (at == n)].mean() for n in numbers])
    if means[0] <= means.max() / 4 and _rank_correlation(means) >= GROWS:
        yield Fact("grows", "the error grows with the position in the document")


def features(view: View) -> Iterator[Fact]:
    """Which heads or features differ, and whether the difference is one vector everywhere."""
    tokens = tokens_of(view)
    if tokens is None or view.sides is None or view.phase != "activation":
        return
    left, right = (side[:, -tokens.segments.shape[1] :][tokens.segments > 0] for side in view.sides)
    if len(left) < 2:
        return
    error = np.abs(left - right)
    apart = left - right
    if left.ndim == 2 and np.linalg.norm(apart - apart.mean(axis=0)) <= max(
        SAME * np.linalg.norm(apart), view.allowed * np.sqrt(apart.size)
    ):
        yield Fact("same-everywhere", "the difference is the same vector at every token")
    limit = min(view.allowed, QUIET * float(error.max()))
    axis = tuple(i for i in range(left.ndim) if i != 1)
    worst = error.max(axis=axis)
    wrong, quiet = worst > view.allowed, worst <= limit
    if wrong.any() and quiet.any() and (wrong | quiet).all():
        what = "heads" if left.ndim == 3 else "features"
        if what == "heads" or _is_block(wrong):
            yield Fact(f"only-some-{what}", f"only {what} {_ranges(wrong)} of {len(wrong)} differ")
    order = _reordered(np.moveaxis(left, 1, 0), np.moveaxis(right, 1, 0), view.allowed)
    if order is not None:
        what = "heads" if left.ndim == 3 else "features"
        moved = ", ".join(f"{i} has {j}" for i, j in enumerate(order[:6]) if i != j)
        yield Fact(f"{what}-moved", f"right's {what} are left's in another order: {moved}")


def moved(view: View) -> Iterator[Fact]:
    """Examples or positions of one side that are the other's at another index."""
    tokens = tokens_of(view)
    if tokens is None or view.sides is None or view.phase != "activation":
        return
    left, right = view.sides
    order = _reordered(left, right, view.allowed)
    if order is not None:
        shown = ", ".join(f"{i} is left's {j}" for i, j in enumerate(order) if i != j)
        yield Fact("rows-moved", f"right's examples are left's at another index: {shown}")
    real = np.pad(
        tokens.segments > 0, ((0, 0), (left.shape[1] - tokens.segments.shape[1], 0)), constant_values=True
    )

    def is_moved(by: int, one: Array, other: Array) -> bool:
        apart = np.abs(np.roll(one, by, axis=1) - other)[np.roll(real, by, axis=1)]
        return bool(apart.max(initial=0.0) <= view.allowed)

    for by in range(1, left.shape[1]):
        # All features only where the first one is moved.
        if is_moved(by, left[..., :1], right[..., :1]) and is_moved(by, left, right):
            further = by if by <= left.shape[1] // 2 else by - left.shape[1]
            yield Fact("positions-moved", f"right's positions are left's, {further:+d}")
            return


def _reordered(left: Array, right: Array, allowed: float) -> list[int] | None:
    """For each entry of `right` the one of `left` that it equals, itself first; None if one equals none, or all themselves."""
    order = []
    for i, entry in enumerate(right):
        indices = (i, *range(len(left)))
        # Only as far as the first: a vocabulary has many entries, most of which equal themselves.
        same = next((j for j in indices if np.abs(left[j] - entry).max(initial=0.0) <= allowed), None)
        if same is None:
            return None
        order.append(same)
    return order if order != list(range(len(order))) else None


def vocabulary(view: View) -> Iterator[Fact]:
    """Whether only tokens of some ids differ, and whose rows they have."""
    tokens, ids = tokens_of(view), view.batch("input_ids")
    if tokens is None or ids is None or ids.shape != tokens.segments.shape:
        return
    if operation(view.tensor) != "at-embedding":  # further on a token's number says nothing
        return
    real = tokens.segments > 0
    wrong, right = np.unique(ids[tokens.differs & real]), np.unique(ids[tokens.quiet & real])
    if not wrong.size or not right.size or np.intersect1d(wrong, right).size:
        return
    if wrong.min() > right.max() or wrong.max() < right.min():
        above = wrong.min() > right.max()
        yield Fact(
            "only-some-tokens",
            f"only tokens {'from' if above else 'up to'} {wrong.min() if above else wrong.max()} differ",
        )
        return
    if wrong.size > 2 and _is_one_stretch(wrong, right):
        yield Fact("only-some-tokens", f"only tokens {wrong.min()} to {wrong.max()} differ")


def _is_one_stretch(wrong: Array, right: Array) -> bool:
    return not np.any((right > wrong.min()) & (right < wrong.max()))


def _is_block(mask: Array) -> bool:
    """Whether what is set is one contiguous block that is no single element."""
    at = np.flatnonzero(mask)
    return len(at) > 1 and at[-1] - at[0] + 1 == len(at)


def _ranges(mask: Array) -> str:
    """`0-3, 6`: the indices at which a mask is set."""
    at, parts = np.flatnonzero(mask), []
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def _rank_correlation(values: Array) -> float:
    """Spearman's correlation of values with their order."""
    ranks = np.argsort(np.argsort(values)).astype(np.float64)
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])
