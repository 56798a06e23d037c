"""What the check said of a planted fault, held to what it must say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from parity.comparison.compare import Finding
from parity.comparison.phases import Location
from parity.diagnosis import Diagnosis
from parity.faults.fault import Fault, Where
from trainspec.plans.plan import Backend, Policy

Help = Literal["helpful", "silent", "misleading"]


@dataclass(frozen=True)
class Outcome:
    """The result of one fault in one backend. `divergence` is the first one, None if the check passed."""

    fault: Fault
    backend: Backend
    precision: Policy
    divergence: Finding | None
    crash: str | None = None
    diagnosis: Diagnosis | None = None

    @property
    def said(self) -> Location | None:
        """The location that the check names."""
        return self.divergence.location if self.divergence else None

    @property
    def expected(self) -> tuple[Where, ...]:
        """Where the check must say that it shows first, at one of them; empty if the check must pass."""
        return self.fault.shows_in(self.precision)

    @property
    def as_expected(self) -> bool:
        """Whether it was caught at the expected location, or rightly passed."""
        if self.crash is not None:
            return False
        below = self.precision in self.fault.below_bound_in
        if self.said is None or not self.expected:
            return self.said is None and (not self.expected or below)
        # A difference about as large as the bound may show first at a neighbour, or a step later.
        near = below and self.said.phase in [where.phase for where in self.expected]
        return near or any(where.matches(self.said) for where in self.expected)

    @property
    def word(self) -> str:
        """`caught`, `passes` (as it must), `below bound`, or what is wrong."""
        if self.crash is not None:
            return "CRASHED"
        if self.as_expected:
            return "caught" if self.said else "below bound" if self.expected else "passes"
        return "MISSED" if self.said is None else "MISPLACED" if self.expected else "FALSE ALARM"

    @property
    def help(self) -> Help | None:
        """Whether the diagnosis helps; None where nothing was to be diagnosed.

        `helpful`: the fault's cause is named, first or as what looks the same. `silent`: no cause is. `misleading`: others are.
        """
        if self.said is None or self.fault.cause is None:
            return None
        named = [cause.name for cause in self.diagnosis.alike] if self.diagnosis else []
        return "helpful" if self.fault.cause in named else "misleading" if named else "silent"

    def as_json(self) -> dict[str, Any]:
        """Its entry in faults.json, besides the words of `parity.faults.results`."""
        return {
            "as_expected": self.as_expected,
            "location": asdict(self.divergence.location) | {"error": self.divergence.error}
            if self.divergence
            else None,
            "expected_at": [asdict(where) for where in self.expected],
            "cause": self.fault.cause,
            "diagnosis": self.diagnosis.as_json() if self.diagnosis else None,
            "report": self.diagnosis.lines() if self.diagnosis else None,
            "crash": self.crash,
        }
