"""The verdict on a comparison: verdict.json for programs, a few lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from parity.comparison.compare import Comparison, Finding
from parity.comparison.phases import PHASES
from parity.diagnosis import Diagnosis
from trainspec.plans.plan import Policy

GREEN, RED, DIM, PLAIN = "\x1b[1;32m", "\x1b[1;31m", "\x1b[2m", "\x1b[0m"
TITLES = {phase.name: phase.title for phase in PHASES}


@dataclass(frozen=True)
class Verdict:
    """What was compared, and the result; `diagnosis` is what a failure looks like, None if nothing could be looked at."""

    precision: Policy
    left: str
    right: str
    comparison: Comparison
    diagnosis: Diagnosis | None = None

    @property
    def holds(self) -> bool:
        """Whether both sides did the same training, to the end."""
        return self.comparison.holds

    @property
    def word(self) -> Literal["pass", "fail"]:
        """`pass` or `fail`."""
        return "pass" if self.holds else "fail"

    @property
    def notes(self) -> list[str]:
        """What a user should know besides the verdict."""
        share, notes = self.comparison.undetermined, []
        if share:
            notes.append(
                f"{share:.2%} of the update elements are rounding noise in {self.precision}: undetermined"
            )
        if self.holds and (unproven := self.comparison.unproven):
            notes.append(_of_unproven(unproven, len(self.comparison.examined)))
        updates = [f for f in self.comparison.findings if f.location.phase == "update"]
        if updates and self.holds and not any(f.elements for f in updates):
            notes.append(
                "no update was made, the learning rate is 0 at every compared step: compare more steps"
            )
        return [*notes, *self.comparison.notes]

    def as_json(self) -> dict[str, Any]:
        """The content of verdict.json. Undefined numbers (a missing tensor's error) are null."""
        first = self.comparison.first_divergence
        return {
            "verdict": self.word,
            "precision": self.precision,
            "steps": self.comparison.steps,
            "left": self.left,
            "right": self.right,
            "worst": {name: _entry(finding) for name, finding in self.comparison.worst.items()},
            "first_divergence": _entry(first) | {"phase": first.location.phase} if first else None,
            "diagnosis": self.diagnosis.as_json() if self.diagnosis else None,
            "unproven": [str(finding.location) for finding in self.comparison.unproven],
            "notes": self.notes,
        }

    def write(self, out: Path) -> Path:
        """Write verdict.json into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / "verdict.json"
        path.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def lines(self, *, colour: bool) -> list[str]:
        """A summary for the terminal."""
        shade = (GREEN if self.holds else RED, PLAIN, DIM) if colour else ("", "", "")
        steps = f"{self.comparison.steps} step{'s' * (self.comparison.steps != 1)}"
        head = f"{shade[0]}{self.word.upper()}{shade[1]}  {self.left}  vs  {self.right}  in {self.precision}, {steps}"
        table = [
            f"{shade[2]}{'worst of each phase':<25}{'error':>9}{'bound':>10}{'used':>9}  where{shade[1]}"
        ]
        for name, finding in self.comparison.worst.items():
            mark = "  " if finding.holds else "✗ "
            numbers = f"{number(finding.error):>9}{number(finding.bound):>10}{number(finding.used):>9}"
            table.append(f"{mark}{TITLES[name]:<23}{numbers}  {where(finding)}")
        first = self.comparison.first_divergence
        end = [f"first divergence: {first.location}: {explained(first)}"] if first else []
        if first and first.values:
            end.append(f"  {values(first)}")
        if self.diagnosis:
            end += self.diagnosis.lines()
        return [head, *table, *end, *(f"note: {note}" for note in self.notes)]


def _of_unproven(unproven: Sequence[Finding], examined: int) -> str:
    """The note that names all tensors whose agreement says nothing; each with its steps."""
    steps: dict[str, list[int]] = {}
    for finding in unproven:
        steps.setdefault(f"{finding.location.phase} of {finding.location.tensor}", []).append(
            finding.location.step
        )
    named = "; ".join(f"{name}, step {', '.join(map(str, each))}" for name, each in steps.items())
    return (
        f"{len(unproven)} of {examined} gradients and updates are not provable, as rounding moves them by half of themselves "
        f"or more: {named}. Each is proven in another layer or at another step; fp64 proves all"
    )


def read_results(path: Path) -> dict[str, Any]:
    """The content of a verdict.json or matrix.json. `headroom`, the older name of `bound_used`, is renamed."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=_renamed)


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    return {"bound_used" if name == "headroom" else name: value for name, value in entry.items()}


def number(value: float | None) -> str:
    """A number formatted for a table; a dash if there is none."""
    if value is None or not isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g}" if 1e-3 <= value < 1e3 else f"{value:.1e}"


def values_at(verdict: Verdict, finding: Finding) -> list[tuple[str, str]]:
    """(side, full value) of a finding's worst element; empty if it has none."""
    if finding.values is None:
        return []
    sides = {"left": verdict.left, "right": verdict.right}
    pairs = zip(finding.names, finding.values, strict=True)
    return [(sides.get(name, name), repr(value)) for name, value in pairs]


def where(finding: Finding) -> str:
    """Step and tensor of a finding."""
    return f"step {finding.location.step}, {finding.location.tensor}"


def explained(finding: Finding) -> str:
    """Why a finding fails, in words."""
    if finding.error is None or finding.reason:
        return finding.reason or "not comparable"
    return f"error {finding.error:.2e} is over the bound {finding.bound:.2e}"


def values(finding: Finding) -> str:
    """Both numbers at the worst element, and its index; empty if there are none."""
    if finding.values is None or finding.index is None:
        return ""
    at = f"at [{', '.join(map(str, finding.index))}]: " if finding.index else ""
    (first, second), (one, other) = finding.values, finding.names
    return f"{at}{first:.9g} ({one}), {second:.9g} ({other})"


def _entry(finding: Finding) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tensor": finding.location.tensor,
        "step": finding.location.step,
        "error": finite(finding.error),
        "bound": finite(finding.bound),
        "bound_used": finite(finding.used),
    }
    if finding.values is not None and finding.index is not None:
        entry["values"] = {name: finite(v) for name, v in zip(finding.names, finding.values, strict=True)}
        entry["index"] = list(finding.index)
    if finding.reason:
        entry["reason"] = finding.reason
    if finding.location.phase == "update" and finding.elements:
        entry["undetermined"] = finding.undetermined / finding.elements
    return entry


def finite(value: float | None) -> float | None:
    """The number, or None for infinity and NaN, which JSON does not have."""
    return value if value is not None and isfinite(value) else None
