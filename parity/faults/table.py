"""The registry of faults and its results, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parity.faults.fault import SETUPS, Fault
from parity.faults.run import Outcome
from parity.faults.shared import SharedFault

PAGE_HEAD = """# Faults that must be caught

Written by `parity faults --page docs/faults.md` from its results. Each fault is planted in one backend, as an edit of its
source while it is loaded, and its trace, activations included, is compared with the other backend's clean one. The check
must fail and name the location where the fault acts first; if the arithmetic is the same, it must pass. The clean pairs
pass. A set-up that is split over devices is so on both sides; a backend that refuses the plan (torch has no split
optimizer and no pipeline in fp64) runs on one device.

A diagnosis (docs/diagnosis.md) is *helpful* if the cause it names, or the one it says looks the same, is that of the fault;
*silent* if it names none; *misleading* if it names others.

fp64 is the proof. In fp32 the two traces are compared with the estimated bounds of `parity diff`: a fault smaller than
rounding is "below bound" there.
"""


def listed(faults: Sequence[Fault]) -> Iterator[str]:
    """The lines of `parity faults --list`."""
    for fault in faults:
        yield f"{fault.name}: {fault.imitates}"
        yield f"    source: {fault.source}"
        yield f"    shows:  {fault.where or 'nowhere in fp64'}; set-up {fault.setup} ({SETUPS[fault.setup]})"
        if fault.cause:
            yield f"    cause:  {fault.cause}"
        if fault.below_bound_in:
            yield f"    below the bound in {', '.join(fault.below_bound_in)}"
        if fault.note:
            yield f"    note:   {fault.note}"


def listed_shared(faults: Sequence[SharedFault]) -> Iterator[str]:
    """The lines of `parity faults --list` for the faults that parity cannot see."""
    for fault in faults:
        yield f"{fault.name}: {fault.imitates}"
        yield f"    source: {fault.source}"
        yield "    shows:  nowhere in parity, as both backends share it; transformers catches it (docs/data.md)"


def result_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each outcome, with the expectation if it is not met."""
    width = max(len(outcome.fault.name) for outcome in outcomes)
    for outcome in outcomes:
        backend = outcome.backend if outcome.fault.source else "both"
        line = f"{outcome.word:<11} {outcome.precision} {backend:<6} {outcome.fault.name:<{width}}  {_said(outcome)}"
        if not outcome.as_expected:
            line += f"; expected: {outcome.fault.where or 'a pass'}"
        yield line + (f"; {outcome.help}: {_named(outcome)}" if outcome.help else "")
        if outcome.help not in (None, "helpful"):
            yield f"{'':<{12}}expected cause: {outcome.fault.cause}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """The numbers of outcomes of each kind, in words."""
    good = sum(outcome.as_expected for outcome in outcomes)
    caught = sum(outcome.word == "caught" for outcome in outcomes)
    passed = sum(outcome.word == "passes" for outcome in outcomes)
    below = good - caught - passed
    return (
        f"{caught} caught at the right location, {passed} pass as they must, {below} below the bound, "
        f"{len(outcomes) - good} not as expected"
    )


def help_summary(outcomes: Sequence[Outcome]) -> str:
    """How many diagnoses help, in words; empty if nothing was diagnosed."""
    given = [outcome.help for outcome in outcomes if outcome.help]
    if not given:
        return ""
    share = given.count("helpful") / len(given)
    return (
        f"diagnosis: {given.count('helpful')} of {len(given)} helpful ({share:.1%}), {given.count('silent')} silent, "
        f"{given.count('misleading')} misleading"
    )


def page(outcomes: Sequence[Outcome]) -> str:
    """The results as a Markdown page: what each fault imitates, and what the check said about it."""
    planted = [outcome for outcome in outcomes if outcome.fault.source]
    faults = dict.fromkeys(outcome.fault for outcome in planted)
    lines = [PAGE_HEAD]
    for precision in dict.fromkeys(outcome.precision for outcome in planted):
        mine = [outcome for outcome in outcomes if outcome.precision == precision]
        rows = [
            _row(
                o.fault.name,
                o.backend,
                o.word,
                _said(o),
                str(o.fault.where or "none: must pass"),
                _named(o),
                o.help or "–",
            )
            for o in mine
            if o.fault.source
        ]
        columns = (
            "fault",
            "backend",
            "result",
            "location named",
            "location expected",
            "cause named",
            "diagnosis",
        )
        head = [_row(*columns), _row(*["---"] * len(columns))]
        lines += [f"## {precision}", "", f"{summary(mine)}; {help_summary(mine)}.", "", *head, *rows, ""]
    about = [_row(f.name, f.imitates, f.source, f.cause or "–", f.setup, f.note or "–") for f in faults]
    head = [_row("fault", "imitates", "source", "cause", "set-up", "note"), _row(*["---"] * 6)]
    lines += ["## What they imitate", "", *head, *about, ""]
    lines += ["## Set-ups", "", *(f"- `{name}`: {words}." for name, words in SETUPS.items())]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _named(outcome: Outcome) -> str:
    """The causes that a diagnosis names: the first, and what looks the same."""
    if outcome.help is None:
        return "–"
    named = [cause.name for cause in outcome.diagnosis.alike] if outcome.diagnosis else []
    return " or ".join(named) or "none"


def _said(outcome: Outcome) -> str:
    if outcome.crash is not None:
        return outcome.crash
    divergence = outcome.divergence
    if divergence is None:
        return "no divergence"
    return f"{divergence.location} ({divergence.reason or f'error {divergence.error:.1e}'})"
