"""The options of a training run besides its recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trainspec.trace import TraceRequest


@dataclass(frozen=True)
class TrainRequest:
    """Where a run writes, whether it writes a trace, and whether it resumes.

    With `resume` it starts from the newest checkpoint in `out`; `allow` names the groups of settings that may have changed.
    """

    out: Path
    trace: TraceRequest | None = None
    resume: bool = False
    allow: Collection[str] = ()
