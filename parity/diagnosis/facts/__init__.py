"""Facts: what can be seen in two traces. Each module looks at one kind of thing; none of them names a cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from parity.diagnosis.fact import Fact
from parity.diagnosis.facts import (
    attention,
    batch,
    factors,
    logits_gradient,
    loss,
    numbers,
    optimizer,
    resume,
    settings,
    spread,
    stream,
    walk,
)
from parity.diagnosis.view import View

FINDERS: tuple[Callable[[View], Iterator[Fact]], ...] = (
    walk.location,
    walk.tensors,
    walk.changes,
    batch.which,
    batch.examples,
    batch.tokens,
    spread.examples,
    spread.documents,
    spread.features,
    spread.moved,
    spread.vocabulary,
    numbers.incomparable,
    factors.multiple,
    factors.other_factors,
    factors.by_token,
    factors.by_slice,
    numbers.zeros,
    numbers.unchanged,
    numbers.rounded,
    numbers.size,
    numbers.layout,
    numbers.other_layer,
    numbers.remainder,
    attention.mixed,
    attention.rotated,
    attention.swapped_prefix,
    stream.sums,
    loss.made_again,
    logits_gradient.made_again,
    optimizer.norm,
    optimizer.clip,
    optimizer.rate,
    optimizer.moments,
    optimizer.update,
    optimizer.momentum,
    resume.restored,
    walk.agreement,
    walk.recovery,
    settings.settings,
    settings.model,
    settings.batch,
)


def facts_of(view: View) -> tuple[Fact, ...]:
    """Every fact about a first divergence, each kind once: what is wrong first, then what agrees, then what the runs are."""
    found: dict[str, Fact] = {}
    for finder in FINDERS:
        for fact in finder(view):
            found.setdefault(fact.kind, fact)
    return tuple(found.values())
