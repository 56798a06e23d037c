"""One trace of a run that was trained in two parts: up to a checkpoint, and on from it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from trainspec.errors import TraceError
from trainspec.trace import STOPPED_FILE, Trace, resume_file, step_file
from trainspec.trace_header import TraceHeader

INITIAL_FILE = "initial.safetensors"


def join(first: Trace, second: Trace, out: Path) -> Trace:
    """Write the steps of `first` up to where `second` begins, then those of `second`, to `out`, which is replaced.

    What `second` was restored to is kept beside its first step. Files are shared with the parts where the disk can do so.
    Raises TraceError if a step is missing between the two.
    """
    resumed = second.first_step
    if resumed not in range(first.first_step + 1, first.first_step + len(first.steps) + 1):
        raise TraceError(
            f"{second.directory}: starts at step {resumed}, which does not follow on {first.directory}; join the parts of one run"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    records = [*(record for record in first.steps if record["step"] < resumed), *second.steps]
    for record in records:
        part, name = second if record["step"] >= resumed else first, step_file(record["step"])
        _share(part.directory / name, out / name)
    if second.stopped:
        _share(second.directory / STOPPED_FILE, out / STOPPED_FILE)
    _share(first.directory / INITIAL_FILE, out / INITIAL_FILE)
    _share(second.directory / INITIAL_FILE, out / resume_file(resumed))
    _header(first, second).write(out)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (out / "trace.jsonl").write_text(lines, encoding="utf-8")
    return Trace(out)


def _header(first: Trace, second: Trace) -> TraceHeader:
    """The second part's header, with both backends where they are two."""
    one, other = (trace.header or TraceHeader() for trace in (first, second))
    header = replace(other, first_step=first.first_step)
    if one.backend == other.backend:
        return header
    return replace(
        header, backend=f"{one.backend}, then {other.backend}", versions={**one.versions, **other.versions}
    )


def _share(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
