"""The registry and its results, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parity.faults.fault import SETUPS, Fault
from parity.faults.run import Outcome

PAGE_HEAD = """# Faults that must be caught

Written by `parity faults --page`; what stands here was run. Each fault is planted in one backend (an edit of its source
while it is loaded), and its trace is compared in float64 with the other backend's clean one. The check must fail and name
the place where the fault acts first; where the arithmetic is the same the check must pass. The clean pairs pass.
"""


def listed(faults: Sequence[Fault]) -> Iterator[str]:
    """What `parity faults --list` shows."""
    for fault in faults:
        yield f"{fault.name}: {fault.imitates}"
        yield f"    source: {fault.source}"
        yield f"    shows:  {fault.where or 'nowhere in fp64'}; set-up {fault.setup} ({SETUPS[fault.setup]})"
        if fault.below_bound_in:
            yield f"    below the bound in {', '.join(fault.below_bound_in)}"
        if fault.note:
            yield f"    note:   {fault.note}"


def result_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each outcome; what is not as expected says what it should have been."""
    width = max(len(outcome.fault.name) for outcome in outcomes)
    for outcome in outcomes:
        backend = outcome.backend if outcome.fault.source else "both"
        line = f"{outcome.word:<11} {backend:<6} {outcome.fault.name:<{width}}  {_said(outcome)}"
        yield line if outcome.as_expected else f"{line}; expected: {outcome.fault.where or 'a pass'}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many were as expected."""
    good = sum(outcome.as_expected for outcome in outcomes)
    caught = sum(outcome.word == "caught" for outcome in outcomes)
    passed = sum(outcome.word == "passes" for outcome in outcomes)
    return f"{caught} caught in place, {passed} pass as they must, {len(outcomes) - good} not as expected"


def page(outcomes: Sequence[Outcome]) -> str:
    """The results as a Markdown page: both backends of a fault side by side."""
    planted = [outcome for outcome in outcomes if outcome.fault.source]
    faults = dict.fromkeys(outcome.fault for outcome in planted)
    rows = ["| fault | imitates | source | place true | jax says | torch says | below the bound in |"]
    rows.append("|---|---|---|---|---|---|---|")
    for fault in faults:
        said = {o.backend: f"{o.word}: {_said(o)}" for o in planted if o.fault == fault}
        cells = (
            fault.name,
            fault.imitates,
            fault.source,
            str(fault.where or "none: must pass"),
            *(said.get(backend, "–") for backend in ("jax", "torch")),
            ", ".join(fault.below_bound_in) or "–",
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    notes = [f"- **{fault.name}**: {fault.note}." for fault in faults if fault.note]
    setups = [f"- `{name}`: {words}." for name, words in SETUPS.items()]
    parts = [PAGE_HEAD, f"{summary(outcomes)}.\n", *rows, "", "## Notes", *notes, "", "## Set-ups", *setups]
    return "\n".join(parts) + "\n"


def _said(outcome: Outcome) -> str:
    if outcome.crash is not None:
        return outcome.crash
    found = outcome.found
    if found is None:
        return "no divergence"
    return f"{found.place} ({found.reason or f'error {found.error:.1e}'})"
