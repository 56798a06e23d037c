"""The page of docs/ with the results of `false_alarms.py`, and the figures that its terminal shows too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainspec.errors import UserError

Record = dict[str, Any]
# What a record says of its making: a digest of the code, the seed's purpose, the precision, the seed, the number of updates.
KEYS = ("sources", "purpose", "precision", "drawn_by", "updates")
# Digits of a digest that a reader sees.
DIGITS = 8
SHOWN = ("loss", "gradient", "grad_norm", "clip", "moment1", "moment2", "update")
PROPERTIES = {
    "trained": "steps trained before",
    "filled": "rows",
    "variant": "model",
    "method": "method",
    "tokens": "tokens of a row",
    "reduce": "gradients summed in",
}
INTRODUCTION = """\
# False alarms: what clean runs use of their bounds

Checks of JAX against torch where nothing is wrong: a share of a bound above 1 is a false alarm. Models are those of
`scripts/make_demo_model.py` after 0 to 200 steps; each case has its method, rows, seed and data drawn. Cases were run with one
set of seeds to find what bounds lack, and with others to test them; no seed is in both. The errors that were made, times
thirty, are judged by the same bounds, and must fail in every phase of many numbers (gradient, moments, update); a single number,
such as the loss, may be right by chance. *Not provable* are gradients and updates that rounding moves by half of themselves or
more, which the verdict of a run names and another layer or step proves ([what-pass-means.md](what-pass-means.md)). Gradients of such
a weight, a fifth too large in all layers and steps, must fail; runs where they do not *hide a mistake*. Made by
`python benchmarks/false_alarms.py --seed S --precision P --groups G --each E --purpose find|test` for every row of the first
table, and `--page docs/false-alarms.md`. What each bound is: [numerics.md](numerics.md).

A run is of the code whose digest begins as its row says (`sources()` of `parity/faults/results.py`). The tables after the first
are of the runs made to test with {code}, the code that this page was written by.
"""


def number(share: float | None) -> str:
    """A share with two digits; ∞ for one that is not finite."""
    return "∞" if share is None else f"{share:.2g}"


def largest(records: Sequence[Record], phase: str) -> tuple[float | None, str]:
    """The largest share of a bound in a phase, and whose it is."""
    worst = max(records, key=lambda record: share_of(record, phase), default=None)
    return (worst["used"].get(phase), worst["name"]) if worst else (0.0, "")


def share_of(record: Record, phase: str) -> float:
    """A share as a number, infinite ones too."""
    share = record["used"].get(phase, 0.0)
    return np.inf if share is None else share


def page(records: Sequence[Record], now: str) -> str:
    """The page of docs/ that holds the results; `now` is the digest of this code.

    Raises UserError where no test is of this code, or a seed has two purposes.
    """
    purposes = {(r["drawn_by"], r["purpose"]) for r in records}
    if both := sorted(seed for seed, purpose in purposes if purpose == "find" and (seed, "test") in purposes):
        raise UserError(f"--page: seed {both[0]} was run both to find and to test; remove the tests with it")
    # Where rows are shorter than every text, packed ones and padded ones are the same: such runs count once.
    different = {json.dumps([[r[key] for key in KEYS], r["used"], r["times_30"]]): r for r in records}
    records = list(different.values())
    tested = [r for r in records if (r["purpose"], r["sources"]) == ("test", now)]
    if not tested:
        raise UserError("--page: there are no tests of this code; run some with --purpose test")
    introduction = INTRODUCTION.format(code=short(now))
    parts = [introduction, runs_table(records), *alarms(records), phases_table(tested), trained_table(tested)]
    return "\n".join(parts)


def short(digest: str) -> str:
    """The digest of code as the page has it."""
    return f"`{digest[:DIGITS]}`"


def runs_table(records: Sequence[Record]) -> str:
    """How many runs were made by each code, to find and to test, and how many of them failed; the newest code last."""
    rows = [
        "| code | made to | precision | updates | seeds | runs | false alarms | thirty times the rounding passes | not provable | hide a mistake |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    parts: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        parts.setdefault((r["sources"], r["purpose"], r["precision"], r["updates"]), []).append(r)
    for (code, purpose, precision, updates), mine in parts.items():
        seeds = ", ".join(map(str, sorted({r["drawn_by"] for r in mine})))
        alarms, blind = (
            sum(r["verdict"] != "pass" for r in mine),
            sum(bool(r["control_passes"]) for r in mine),
        )
        unproven, examined = (sum(r[key] for r in mine) for key in ("unproven", "examined"))
        hiding = sum(bool(r["hidden"]) for r in mine)
        made = f"{short(code)} | {purpose} | {precision} | {updates} | {seeds}"
        rows.append(f"| {made} | {len(mine)} | {alarms} | {blind} | {unproven / examined:.1%} | {hiding} |")
    return "\n".join([*rows, ""])


def alarms(records: Sequence[Record]) -> list[str]:
    """Each false alarm, with its code and its first divergence."""
    rows = [
        f"- {short(r['sources'])}, {r['precision']}, made to {r['purpose']}: {r['name']}: {r['first']}."
        for r in records
        if r["verdict"] != "pass"
    ]
    return (
        ["\n".join(["False alarms, under the bounds of the code that is named:", "", *rows, ""])]
        if rows
        else []
    )


def phases_table(records: Sequence[Record]) -> str:
    """The largest share of a bound by phase, and the smallest that thirty times the rounding takes."""
    rows = ["## The largest share of a bound, by phase", ""]
    rows += ["| phase | fp32 | bf16 | × 30 at the least, fp32 | bf16 |", "|---|---|---|---|---|"]
    by_precision = [[r for r in records if r["precision"] == precision] for precision in ("fp32", "bf16")]
    for phase in SHOWN:
        most = [number(largest(mine, phase)[0]) if mine else "–" for mine in by_precision]
        least = [smallest_times_30(mine, phase) for mine in by_precision]
        rows.append(f"| {phase} | {' | '.join([*most, *least])} |")
    return "\n".join([*rows, ""])


def smallest_times_30(records: Sequence[Record], phase: str) -> str:
    """The smallest finite share that thirty times the rounding takes of a phase's bound."""
    shares = [share for r in records if (share := r["times_30"].get(phase)) is not None]
    return number(min(shares)) if shares else "–"


def trained_table(records: Sequence[Record]) -> str:
    """The largest share of a gradient's bound by property."""
    rows = [
        "## The largest share of a gradient's bound, by what the run is",
        "",
        "| property | value | runs | fp32 | bf16 |",
        "|---|---|---|---|---|",
    ]
    for prop in ("trained", "filled", "variant", "method", "tokens", "reduce"):
        for value in dict.fromkeys(
            sorted((r["case"][prop] for r in records), key=lambda v: (str(type(v)), v))
        ):
            mine = [r for r in records if r["case"][prop] == value]
            by_precision = [
                [r for r in mine if r["precision"] == precision] for precision in ("fp32", "bf16")
            ]
            shares = [number(largest(part, "gradient")[0]) if part else "–" for part in by_precision]
            rows.append(f"| {PROPERTIES[prop]} | {value} | {len(mine)} | {' | '.join(shares)} |")
    return "\n".join([*rows, ""])
