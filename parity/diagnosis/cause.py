"""What a cause is: a mistake of a kind, the facts that speak for it, and where the contract says what is right."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# What a cause needs before it is named at all. One strong fact, or two weak ones beside what it needs.
NAMED = 3
# What each needed fact counts, besides what `fits` gives it.
NEEDED = 1


@dataclass(frozen=True)
class Contract:
    """A line of docs/numerics.md: the heading it stands under, and words of it."""

    section: str
    words: str

    def __str__(self) -> str:
        return f'docs/numerics.md, {self.section}: "{self.words}"'


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A kind of mistake.

    `phases` are those in which it may show first. Each of `needs` must be among the facts, `a|b` for either; none of `excluded`
    may be. `fits` are facts that speak for it, by how much (1 weak, 3 strong, 6 can hardly be anything else). `next` tells it
    from what looks the same; RECIPE and RIGHT stand for the recipe and the right side's backend. `alike` are causes that
    leave the same facts as a rule.
    """

    name: str
    sentence: str
    contract: Contract
    phases: Collection[str]
    fits: Mapping[str, int] = field(hash=False)
    next: str
    needs: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()

    def score(self, phase: str, kinds: Collection[str]) -> int | None:
        """How well the facts fit, by their kinds; None if the cause is out of the question."""
        if phase not in self.phases or any(kind in kinds for kind in self.excluded):
            return None
        if not all(any(kind in kinds for kind in need.split("|")) for need in self.needs):
            return None
        return NEEDED * len(self.needs) + sum(points for kind, points in self.fits.items() if kind in kinds)

    def kinds(self) -> set[str]:
        """Every kind of fact that it asks for."""
        needed = {kind for need in self.needs for kind in need.split("|")}
        return needed | set(self.excluded) | set(self.fits)
