"""The processes of a run, as the loop sees them: which one this is, and words that all of them exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _alone(text: str) -> list[str]:
    return [text]


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and `exchange`, which gives every process the texts of all, in order.

    `exchange` is a collective: all processes call it at the same points of the run, from their main thread.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[str], list[str]] = _alone

    @property
    def is_leader(self) -> bool:
        """Whether this is the one process that has the console."""
        return self.index == 0
