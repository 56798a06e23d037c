"""Does a diagnosis lead to the right line of the contract, for somebody who does not know what is wrong?

    python benchmarks/blind_diagnosis.py --seed 1 [--count 20] [--precision fp64] [--from DIR] [--out DIR]
    python benchmarks/blind_diagnosis.py --score DIR [--answers FILE]

Draws faults from the registry by the seed, each with a backend that it is planted in, and writes OUT/cases.txt: for each
what the report says (first divergence and diagnosis), under a number. Which fault it is stands in OUT/key.json alone.
With --from the reports are those of an earlier `parity faults --out DIR` of the same code; otherwise the faults are trained.

`--score` compares with the key: the line that the diagnosis names first, and that of the cause which it says looks the same.
A reader's own answers are scored with --answers: a file with a line `NUMBER LINE` for each case, LINE being that of
docs/numerics.md where the reader would look. A line of the contract is an item of one of its lists, or a paragraph.
Exit code 1 if fewer than nine in ten lead to the right line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from parity.diagnosis.cause import Contract
from parity.diagnosis.causes import CAUSES
from parity.faults import FAULTS
from parity.faults.fault import Fault
from parity.faults.results import entries_in, entry_of
from parity.faults.run import BACKENDS, run_faults
from trainspec.errors import EXIT_USER_ERROR, UserError
from trainspec.plans.plan import Backend, Policy

CONTRACT = Path(__file__).parent.parent / "docs/numerics.md"
GOOD = 0.9
Drawn = tuple[Fault, Backend]


@dataclass(frozen=True)
class Item:
    """An item of a list of the contract, or a paragraph: its section, its lines, its text on one line."""

    section: str
    lines: range
    text: str


def items() -> list[Item]:
    """Every item of the contract."""
    found: list[Item] = []
    section, start, words = "", 1, list[str]()

    def close(end: int) -> None:
        if words:
            found.append(Item(section, range(start, end), " ".join(words)))
        words.clear()

    lines = CONTRACT.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        heading = re.match(r"#+ (.*)", line)
        if heading or not line.strip() or line.startswith(("- ", "| ")):
            close(number)
            start = number
        section = heading[1] if heading else section
        if line.strip() and not heading:
            words.append(line.strip())
    close(len(lines) + 1)
    return found


def item_of(contract: Contract, every: Sequence[Item]) -> Item:
    """The item with a contract's words in its section, or the first in which they begin (they may go on in the next)."""
    mine = [item for item in every if item.section == contract.section]
    return next(item for item in mine if contract.words in item.text)


def draw(seed: int, count: int, precision: Policy) -> list[Drawn]:
    """Faults that a check must catch, each with a backend; no fault twice."""
    able: list[tuple[Fault, list[Backend]]] = [
        (f, [b for b in BACKENDS if f.applies(b, precision)]) for f in FAULTS if f.where
    ]
    able = [
        (fault, backends) for fault, backends in able if backends and precision not in fault.below_bound_in
    ]
    dice = random.Random(seed)
    return [(fault, dice.choice(backends)) for fault, backends in dice.sample(able, min(count, len(able)))]


def reports(drawn: Sequence[Drawn], precision: Policy, kept: Path | None, out: Path) -> list[dict[str, Any]]:
    """The entry of faults.json for each drawn fault: kept ones, or made now."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    if kept is not None:
        entries = {(e["fault"], e["backend"]): e for e in entries_in(kept) if e["precision"] == precision}
    else:
        for backend in BACKENDS:
            faults = [fault for fault, b in drawn if b == backend]
            outcomes = run_faults(faults, [backend], out / backend, precision=precision) if faults else []
            entries |= {(o.fault.name, o.backend): entry_of(o) for o in outcomes}
    missing = [f"{fault.name} ({b})" for fault, b in drawn if (fault.name, b) not in entries]
    if missing:
        raise UserError(f"--from {kept}: no result of {', '.join(missing)} in {precision}")
    return [entries[fault.name, b] for fault, b in drawn]


def report_lines(entry: dict[str, Any]) -> Iterator[str]:
    """What a report says, without the fault's name."""
    yield f"first divergence: {entry['said']}"
    yield from (entry["report"] or ["no diagnosis"])


def score(out: Path, answers: Path | None) -> int:
    """Print each case with the line that was named and the right one; the exit code."""
    every, key = items(), json.loads((out / "key.json").read_text(encoding="utf-8"))
    given = read_answers(answers) if answers else {}
    first = either = 0
    for number, case in enumerate(key, 1):
        right = item_of(CAUSES[case["cause"]].contract, every)
        if answers:
            named = [item for item in every if given.get(number) in item.lines]
        else:
            named = [item_of(CAUSES[name].contract, every) for name in case["named"]]
        first += named[:1] == [right]
        either += right in named
        word = "right" if right in named else "WRONG" if named else "SILENT"
        said = ", ".join(f"{CONTRACT.name}:{item.lines[0]}" for item in named) or "none"
        print(f"{number:>2} {word:<6} {case['fault']} ({case['backend']}): {said}; right is {right.lines[0]}")
    whose = "answers" if answers else "diagnoses"
    print(f"{either} of {len(key)} {whose} lead to the right line of the contract ({first} of them at once)")
    return 0 if either >= GOOD * len(key) else 1


def read_answers(file: Path) -> dict[int, int]:
    """The line that a reader gave, by the number of the case."""
    pairs = (line.split()[:2] for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {int(number): int(line) for number, line in pairs}


def main() -> int:
    """Draw and write the cases, or score them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--precision", choices=get_args(Policy), default="fp64")
    parser.add_argument("--from", dest="kept", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/blind-diagnosis"), metavar="DIR")
    parser.add_argument("--score", type=Path, metavar="DIR")
    parser.add_argument("--answers", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.score:
        return score(args.score, args.answers)
    try:
        return write(args)
    except UserError as error:
        print(f"blind_diagnosis: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def write(args: argparse.Namespace) -> int:
    """Draw cases; write what their reports say, and the key."""
    if args.count < 1:
        raise UserError(f"--count {args.count}: draw at least 1")
    drawn = draw(args.seed, args.count, args.precision)
    args.out.mkdir(parents=True, exist_ok=True)
    entries = reports(drawn, args.precision, args.kept, args.out)
    cases = [f"case {n}\n" + "\n".join(report_lines(entry)) for n, entry in enumerate(entries, 1)]
    (args.out / "cases.txt").write_text("\n\n".join(cases) + "\n", encoding="utf-8")
    key = [
        {
            "fault": fault.name,
            "backend": backend,
            "cause": fault.cause,
            "named": entry["diagnosis"]["alike"] if entry["diagnosis"] else [],
        }
        for (fault, backend), entry in zip(drawn, entries, strict=True)
    ]
    (args.out / "key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out / 'cases.txt'}: {len(cases)} cases; read it, then run with --score {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
