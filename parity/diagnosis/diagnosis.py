"""A diagnosis: the facts about a first divergence, the causes that fit them, ranked, and what to run next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from parity.comparison.compare import Comparison
from parity.diagnosis.cause import NAMED, Cause
from parity.diagnosis.causes import CAUSES
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts import facts_of
from parity.diagnosis.view import View, view_of
from trainspec.trace import Trace

# Two causes look the same if their scores are this close.
ALIKE = 2
MOST_CAUSES = 4
# Facts that a terminal shows; the report and verdict.json have all.
MOST_FACTS = 5


@dataclass(frozen=True)
class Fit:
    """A cause and how well the facts fit it."""

    cause: Cause
    score: int


@dataclass(frozen=True)
class Diagnosis:
    """What was seen, which causes fit it, the best first, and the next command.

    `excluded` are causes that may show at this phase and that a fact speaks against, for where none fits.
    """

    facts: tuple[Fact, ...]
    causes: tuple[Fit, ...]
    excluded: tuple[str, ...]
    next: str

    @property
    def alike(self) -> tuple[Cause, ...]:
        """The first cause, and the second if it looks the same; empty if none fits."""
        if not self.causes:
            return ()
        best = self.causes[0].score
        return tuple(each.cause for each in self.causes[:2] if each.score >= best - ALIKE)

    @property
    def seen(self) -> tuple[str, ...]:
        """The words of the facts that speak for the causes named, the strongest first; of all where none is."""
        if not self.causes:
            return tuple(dict.fromkeys(fact.words for fact in self.facts))
        points: dict[str, int] = {}
        for cause in self.alike:
            for kind in cause.kinds():
                points[kind] = max(points.get(kind, 0), cause.fits.get(kind, 0))
        speaking = [fact for fact in self.facts if fact.kind in points]
        return tuple(dict.fromkeys(f.words for f in sorted(speaking, key=lambda f: -points[f.kind])))

    def lines(self) -> list[str]:
        """For a terminal: a heading with the cause, what was seen, the contract's line, what to run."""
        words = self.seen[:MOST_FACTS]
        if not self.causes:
            head = "diagnosis: no known cause fits well"
            out = f"  spoken against: {', '.join(self.excluded)}" if self.excluded else ""
            return [head, *_seen(words), *([out] if out else []), f"  next: {self.next}"]
        first, *second = self.alike
        lines = [f"diagnosis: {first.name}: {first.sentence}"]
        if second:
            lines.append(f"  looks the same: {second[0].name}: {second[0].sentence}")
        lines += [*_seen(words), f"  contract: {first.contract}", f"  next: {self.next}"]
        return lines

    def as_json(self) -> dict[str, Any]:
        """Its entry in verdict.json."""
        return {
            "facts": [{"kind": fact.kind, "words": fact.words} for fact in self.facts],
            "causes": [
                {
                    "name": each.cause.name,
                    "sentence": each.cause.sentence,
                    "contract": {"section": each.cause.contract.section, "words": each.cause.contract.words},
                    "score": each.score,
                }
                for each in self.causes
            ],
            "alike": [cause.name for cause in self.alike],
            "excluded": list(self.excluded),
            "next": self.next,
        }

    def for_sides(self, recipe: str | None, right: str) -> Diagnosis:
        """The same with the recipe and the right side's backend in the command."""
        return replace(self, next=self.next.replace("RECIPE", recipe or "RECIPE").replace("RIGHT", right))


def diagnose(
    comparison: Comparison, traces: tuple[Trace, Trace] | None, *, counts: Mapping[str, float] | None = None
) -> Diagnosis | None:
    """The diagnosis of a failed comparison; None if it holds, or if there are no traces to look at.

    `counts` are what the recipe counts (accumulation, rank, ...), by name: a constant factor may be one of them.
    """
    view = view_of(comparison, traces, counts) if traces else None
    return diagnosed(view, facts_of(view)) if view else None


def diagnosed(view: View, facts: tuple[Fact, ...]) -> Diagnosis:
    """The causes that fit some facts, ranked."""
    kinds = {fact.kind for fact in facts}
    scores = {name: cause.score(view.phase, kinds) for name, cause in CAUSES.items()}
    fitting = [
        Fit(CAUSES[name], score) for name, score in scores.items() if score is not None and score >= NAMED
    ]
    ranked = sorted(fitting, key=lambda each: -each.score)[:MOST_CAUSES]
    possible = [name for name, cause in CAUSES.items() if view.phase in cause.phases]
    excluded = () if ranked else tuple(name for name in possible if scores[name] is None)
    command = (
        ranked[0].cause.next if ranked else f"parity check RECIPE --steps {view.batch_step} --precision fp64"
    )
    return Diagnosis(facts, tuple(ranked), excluded, command)


def _seen(words: tuple[str, ...]) -> list[str]:
    return [f"  seen: {'; '.join(words)}"] if words else []
