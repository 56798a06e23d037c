"""The header of a trace, DIR/trace.json: what the run was, so that a comparison knows what it compares.

    policy, reduce         the precision, as in a recipe: fp64, fp32 or bf16; the type that gradients are summed in
    backend, versions      the program, and the versions of the packages that can change its numbers
    plan, method           as in a recipe
    identity               digests of the run's contents (`trainspec.checkpoints.identity`): model, weights, tokenizer, data, method
    first_step             the first recorded step: 1 where nothing is said, more where the run resumed from a checkpoint
    order                  where the causal order of the names comes from: given (by the program's user), names (the order of a
                           name map) or recording (the order in which the weights were recorded); nothing where it is exact

Every key may be left out, and so may the file: a program that writes traces states what it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from trainspec.errors import TraceError, nearest
from trainspec.plans.plan import Policy

HEADER_FILE = "trace.json"
# Where the causal order of a trace's names comes from.
OrderOrigin = Literal["given", "names", "recording"]
_POLICIES, _ORIGINS = get_args(Policy), get_args(OrderOrigin)


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a trace says of its run; None or empty where it says nothing."""

    policy: Policy | None = None
    reduce: Policy | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    first_step: int | None = None
    order: OrderOrigin | None = None

    def write(self, directory: Path) -> None:
        """Write it into a trace's directory; nothing where it says nothing."""
        stated = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        if stated:
            (directory / HEADER_FILE).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def read_header(directory: Path) -> TraceHeader | None:
    """The header of a trace, None if it has none. Raises TraceError for a key or a value that is not known."""
    path = directory / HEADER_FILE
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{path}: not JSON ({error}); write the trace again, or remove this file") from None
    if not isinstance(stated, dict):
        raise TraceError(f"{path}: not a JSON object; write the trace again, or remove this file")
    known = [each.name for each in fields(TraceHeader)]
    for key, value in stated.items():
        if key not in known:
            raise TraceError(f"{path}: {key!r} is no key of a header{nearest(key, known)}")
        if wanted := _wanted(key, value):
            raise TraceError(f"{path}: {key} is {value!r}; give {wanted}, or leave it out")
    return TraceHeader(**stated)


def _wanted(key: str, value: object) -> str | None:
    """What a key takes, if `value` is something else."""
    match key:
        case "policy" | "reduce":
            return None if value in _POLICIES else " or ".join(_POLICIES)
        case "order":
            return None if value in _ORIGINS else " or ".join(_ORIGINS)
        case "backend":
            return None if isinstance(value, str) else "a name"
        case "first_step":
            is_step = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            return None if is_step else "a step, counted from 1"
        case _:
            return None if isinstance(value, dict) else "an object"
