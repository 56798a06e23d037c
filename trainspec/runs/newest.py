"""The newest state of a run's directory, for those that read it and change nothing: evaluation and generation."""

from __future__ import annotations

from pathlib import Path

from trainspec.checkpoints.checkpoint import read_origin
from trainspec.checkpoints.folders import aside, checkpoints_of, latest
from trainspec.checkpoints.formats import Formats
from trainspec.runs.contract import Backend, S
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run


def newest_state(
    backend: Backend[S], run: Run, *, out: Path, processes: Processes, tokenizer_digest: str
) -> tuple[S, str]:
    """The state of the newest checkpoint in `out`, else the starting one, and what to call it.

    All processes read the one that the leader finds. Raises WeightsError for a damaged one: unlike a run that resumes, nobody
    asked for the one before it.
    """
    state = backend.init_state(run)
    found = latest(out)
    [name, *_] = processes.exchange(found.name if found else "")
    if not name:
        return state, f"the starting weights ({_what_is_there(out)})"
    saved = checkpoints_of(out) / name
    state = Formats(backend, run, processes).restore(state, saved)
    identity = read_origin(saved).identity
    is_another = identity is not None and identity.tokenizer != tokenizer_digest
    note = "; the tokenizer's files are not those that it was trained with" if is_another else ""
    return state, f"{out} at step {state.step}{note}"


def _what_is_there(out: Path) -> str:
    """Why there is no checkpoint to read: none was saved, or all are set aside."""
    names = ", ".join(path.name for path in aside(out))
    return (
        f"no whole checkpoint under {out}: set aside as damaged: {names}"
        if names
        else f"no checkpoint under {out}"
    )
