"""What the float64 reference is asked about responses, and what it says (`parity.runs.rescore`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """A prompt's ids and the `agreed` ones after it; `parts`: the sides' next tokens differ, so all of its logits are wanted."""

    prompt: list[int]
    agreed: list[int]
    parts: bool


@dataclass(frozen=True)
class RescoredRow:
    """What the reference says of a row of T agreed tokens.

    `log_probs` [T] are theirs, `moved` [T] the mean squares of their movements over all draws, `largest` [T] the largest
    magnitudes of the logits that they were chosen from. `logits` [V] are those after them and `drawn` [draws, V] the same of each
    draw; both are empty where the row does not part.
    """

    log_probs: Array
    moved: Array
    largest: Array
    logits: Array
    drawn: Array
