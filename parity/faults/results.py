"""Results of planted faults as they are kept in faults.json, so that a run of the whole registry can be made in parts.

    {"sources": SHA-256 of the packages' code, "results": [an entry for each fault, backend and precision]}

A part adds to what earlier parts left in the same directory, if they ran the same code; results of other code are dropped,
and a page is not written from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from parity.faults import FAULTS
from parity.faults.fault import Fault
from parity.faults.outcome import Outcome
from parity.faults.run import BACKENDS
from trainspec.errors import UserError
from trainspec.plans.plan import Backend, Policy

FILE = "faults.json"
PACKAGES = ("trainspec", "jaxtrain", "torchtrain", "parity")
# The words of a result that is as it must be.
EXPECTED = ("caught", "passes", "below bound")
# How many missing results an error names.
SHOWN = 3


@dataclass(frozen=True)
class Result:
    """What a page says of one fault in one backend and precision; all of it as words."""

    fault: str
    backend: str
    precision: str
    word: str
    said: str
    expected: str
    named: str
    help: str | None

    @property
    def is_planted(self) -> bool:
        """Whether it is a fault's, not that of a clean pair."""
        return self.fault in {fault.name for fault in FAULTS}

    @property
    def is_expected(self) -> bool:
        """Whether it was caught at its location, rightly passed, or is below a bound."""
        return self.word in EXPECTED


def result_of(outcome: Outcome) -> Result:
    """The words of an outcome."""
    return Result(
        outcome.fault.name,
        outcome.backend,
        outcome.precision,
        outcome.word,
        _said(outcome),
        " or ".join(map(str, outcome.expected)) or "none: must pass",
        _named(outcome),
        outcome.help,
    )


def entry_of(outcome: Outcome) -> dict[str, Any]:
    """The entry of an outcome: the words of its result, and what they are of."""
    return asdict(result_of(outcome)) | outcome.as_json()


def sources() -> str:
    """A digest of the code of all packages: two results are of the same code if theirs are equal."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec
        assert spec.origin
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def store(directory: Path, outcomes: Sequence[Outcome]) -> None:
    """Add outcomes to the directory's faults.json; earlier results stay unless they are of other code or made again."""
    now, kept = sources(), []
    made = {(o.fault.name, o.backend, o.precision) for o in outcomes}
    if (directory / FILE).is_file():
        before = _read(directory)
        if before["sources"] == now:
            kept = [e for e in before["results"] if (e["fault"], e["backend"], e["precision"]) not in made]
    entries = [*kept, *map(entry_of, outcomes)]
    text = json.dumps({"sources": now, "results": entries}, indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")


def collected(directories: Iterable[Path]) -> list[Result]:
    """The results of several directories in the registry's order, those of clean pairs first.

    Raises UserError where they are of other code, or where the registry has a fault without a result in a precision of which
    there are results.
    """
    found = {}
    for directory in directories:
        for entry in entries_in(directory):
            result = Result(**{name: entry[name] for name in Result.__dataclass_fields__})
            found[result.fault, result.backend, result.precision] = result
    return list(_in_order(found))


def entries_in(directory: Path) -> list[dict[str, Any]]:
    """The entries of a directory's faults.json. Raises UserError where they are of other code than this."""
    stored = _read(directory)
    if stored["sources"] != sources():
        raise UserError(
            f"--from {directory}: its results are of other code than this; run parity faults --out {directory} again"
        )
    return stored["results"]


def _in_order(found: Mapping[tuple[str, str, str], Result]) -> Iterable[Result]:
    precisions: list[Policy] = [p for p in get_args(Policy) if p in {key[2] for key in found}]
    wanted: list[tuple[Fault, Backend, Policy]] = [
        (fault, b, p) for p in precisions for fault in FAULTS for b in BACKENDS if fault.applies(b, p)
    ]
    missing = [f"{f.name} ({b}, {p})" for f, b, p in wanted if (f.name, b, p) not in found]
    if missing or not precisions:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise UserError(f"--from: no result of {len(missing)} of {len(wanted)} faults: {shown or 'any'}")
    clean = [result for result in found.values() if not result.is_planted]
    yield from (result for p in precisions for result in clean if result.precision == p)
    yield from (found[fault.name, b, p] for fault, b, p in wanted)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"sources": stored["sources"], "results": stored["results"]}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; parity faults --out {directory} writes it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what parity faults --out writes; remove it") from None


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
