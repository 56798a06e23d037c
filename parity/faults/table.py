"""The registry of faults and its results, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parity.faults import FAULTS
from parity.faults.fault import SETUPS, Fault
from parity.faults.outcome import Outcome
from parity.faults.results import EXPECTED, Result, result_of
from parity.faults.shared import SharedFault
from parity.report.markdown import table

PAGE_HEAD = """# Faults that must be caught

Written by `parity faults --page docs/faults.md` from its results. Each fault is planted in one backend, as an edit of its
source while it is loaded, and its trace, activations included, is compared with the other backend's clean one. The check
must fail and name the location where the fault acts first; if the arithmetic is the same, it must pass. The clean pairs
pass. A set-up that is split over devices is so on both sides; a backend that refuses the plan (torch has no split
optimizer and no pipeline in fp64) runs on one device.

A diagnosis (docs/diagnosis.md) is *helpful* if the cause it names, or the one it says looks the same, is that of the fault;
*silent* if it names none; *misleading* if it names others.

fp64 is the proof. In fp32 the two traces are compared with the estimated bounds of `parity diff`; in bf16, where both sides
compute in bfloat16, with measured ones, as `parity check` does. A fault smaller than rounding is "below bound" there, and
one whose first place rounding hides is expected there or where it shows next.

A fault of a resume is planted in the second part of a run, which goes on from a clean run's checkpoint, and compared with the
other backend's run that was not stopped. A whole run takes long; it can be made in parts, `parity faults --only NAME ... --out DIR`,
and the page written of what they left, `parity faults --page FILE --from DIR`.
"""


def listed(faults: Sequence[Fault]) -> Iterator[str]:
    """The lines of `parity faults --list`."""
    for fault in faults:
        yield f"{fault.name}: {fault.imitates}"
        yield f"    source: {fault.source}"
        yield f"    shows:  {fault.where or 'nowhere in fp64'}; set-up {fault.setup} ({SETUPS[fault.setup]})"
        for precision, where in fault.later_in.items():
            yield f"    in {precision}, perhaps: {where}"
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
    for outcome, result in zip(outcomes, map(result_of, outcomes), strict=True):
        backend = outcome.backend if outcome.fault.source else "both"
        line = f"{result.word:<11} {result.precision} {backend:<6} {result.fault:<{width}}  {result.said}"
        if not outcome.as_expected:
            line += f"; expected: {' or '.join(map(str, outcome.expected)) or 'a pass'}"
        yield line + (f"; {result.help}: {result.named}" if result.help else "")
        if result.help not in (None, "helpful"):
            yield f"{'':<{12}}expected cause: {outcome.fault.cause}"


def summary(results: Sequence[Result]) -> str:
    """The numbers of results of each kind, in words."""
    words = [result.word for result in results]
    expected = [words.count(word) for word in EXPECTED]
    return (
        f"{expected[0]} caught at the right location, {expected[1]} pass as they must, {expected[2]} below the bound, "
        f"{len(words) - sum(expected)} not as expected"
    )


def help_summary(results: Sequence[Result]) -> str:
    """How many diagnoses help, in words; empty if nothing was diagnosed."""
    given = [result.help for result in results if result.help]
    if not given:
        return ""
    share = given.count("helpful") / len(given)
    return (
        f"diagnosis: {given.count('helpful')} of {len(given)} helpful ({share:.1%}), {given.count('silent')} silent, "
        f"{given.count('misleading')} misleading"
    )


def page(results: Sequence[Result]) -> str:
    """The results as a Markdown page: what each fault imitates, and what the check said about it."""
    lines = [PAGE_HEAD]
    columns = (
        "fault",
        "backend",
        "result",
        "location named",
        "location expected",
        "cause named",
        "diagnosis",
    )
    for precision in dict.fromkeys(result.precision for result in results):
        mine = [result for result in results if result.precision == precision]
        rows = [
            (r.fault, r.backend, r.word, r.said, r.expected, r.named, r.help or "–")
            for r in mine
            if r.is_planted
        ]
        said = f"{summary(mine)}; {help_summary(mine)}."
        lines += [f"## {precision}", "", said, "", *table(columns, rows), ""]
    planted = {result.fault for result in results}
    about = [
        (f.name, f.imitates, f.source, f.cause or "–", f.setup, f.note or "–")
        for f in FAULTS
        if f.name in planted
    ]
    columns = ("fault", "imitates", "source", "cause", "set-up", "note")
    lines += ["## What they imitate", "", *table(columns, about), ""]
    lines += ["## Set-ups", "", *(f"- `{name}`: {words}." for name, words in SETUPS.items())]
    return "\n".join(lines) + "\n"
