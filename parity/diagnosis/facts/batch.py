"""What differs in the batch and in the count of target tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.comparison.pair import NAMES
from parity.comparison.phases import BATCH_TENSORS
from parity.diagnosis.fact import Fact
from parity.diagnosis.view import Array, View

# A whole example differs where so much of it does.
WHOLE = 0.3
ONLY = {"labels": "only-labels", "positions": "only-positions", "segments": "only-segments"}


def which(view: View) -> Iterator[Fact]:
    """Which of a batch's arrays differ."""
    names = {f.location.tensor for f in view.failing}
    if view.phase == "batch" and len(names) == 1 and (kind := ONLY.get(next(iter(names)))):
        yield Fact(kind, f"of the batch only {next(iter(names))} differ")


def examples(view: View) -> Iterator[Fact]:
    """Whether whole examples differ, and where the other side has them."""
    sides = _rows(view, view.step)
    if view.phase != "batch" or sides is None or view.tensor != BATCH_TENSORS[0]:
        return
    left, right = sides
    wrong = (left != right).any(axis=1)
    if wrong.any() and np.mean((left != right)[wrong]) >= WHOLE:
        yield Fact("whole-examples", f"{wrong.sum()} of {len(wrong)} examples differ, as wholes")
    one, other = (side[np.lexsort(side.T)] for side in sides)
    if np.array_equal(one, other):
        yield Fact("same-examples", "the same examples in another order")
        return
    steps = [step for step in view.pair.step_numbers if step != view.step]
    others = {step: rows for step in steps if (rows := _rows(view, step)) is not None}
    for at, name in enumerate(NAMES):
        for step, rows in others.items():
            if np.array_equal(sides[at], rows[1 - at]):
                yield Fact("a-step-off", f"{name} has the examples of {NAMES[1 - at]}'s step {step}")
                return
    yield from _shifted(view, sides, others)


def _rows(view: View, step: int) -> tuple[Array, Array] | None:
    left, right = view.pair.read(step, "batch", BATCH_TENSORS[0])
    if left is None or right is None or left.shape != right.shape or left.ndim != 2:
        return None
    return left, right


def _shifted(
    view: View, sides: tuple[Array, Array], others: dict[int, tuple[Array, Array]]
) -> Iterator[Fact]:
    """Examples that the other side has some numbers further on, over all steps."""
    size = len(sides[0])
    first, elsewhere = (view.step - view.pair.first_step) * size, False
    for at, name in enumerate(NAMES):
        every = {step: rows[1 - at] for step, rows in others.items()} | {view.step: sides[1 - at]}
        numbered: dict[bytes, int] = {}
        for step, rows in sorted(every.items()):
            for i, row in enumerate(rows):
                numbered.setdefault(row.tobytes(), (step - view.pair.first_step) * size + i)
        known = [(first + i, row.tobytes()) for i, row in enumerate(sides[at]) if row.tobytes() in numbered]
        by = [numbered[row] - here for here, row in known]
        if len(by) > size // 2 and by[0] and len(set(by)) == 1:
            yield Fact(
                "examples-shifted",
                f"{name} has {NAMES[1 - at]}'s examples, {by[0]:+d} in the order of the data",
            )
            return
        elsewhere |= any(numbered[row] // size != here // size for here, row in known)
    if elsewhere:
        yield Fact("examples-of-another-step", "one side has examples that the other has at another step")


def tokens(view: View) -> Iterator[Fact]:
    """Which side's count of target tokens is not that of the labels, and what it counts instead."""
    if view.phase != "tokens" or view.sides is None:
        return
    labels, wanted = view.batch("labels"), view.targets()
    if labels is None or labels.ndim != 2:
        return
    for name, side, _ in view.named_sides():
        count = int(side)
        if count == wanted:
            continue
        yield Fact("count-off", f"{name} counts {count} target tokens, the labels have {wanted}")
        positions = {
            labels.size: "positions",
            labels.shape[0] * (labels.shape[1] - 1): "positions with a next one",
        }
        if count in positions:
            yield Fact("count-of-positions", f"{count} is the number of {positions[count]}")
        elif (
            count > wanted
            and (count - wanted) % labels.shape[0] == 0
            and view.setting("method", "virtual_tokens")
        ):
            more = (count - wanted) // labels.shape[0]
            yield Fact(
                "count-of-virtual", f"{count} is {more} more for each example, which has virtual tokens"
            )
