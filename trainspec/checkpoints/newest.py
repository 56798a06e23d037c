"""The newest state of a run's directory, for those that read it and change nothing: evaluation and generation."""

from __future__ import annotations

from pathlib import Path

from trainspec.checkpoints.checkpoint import read_origin
from trainspec.checkpoints.folders import aside, checkpoints_of, latest
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.states import S, States
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run


def newest_state(
    backend: States[S], run: Run, *, out: Path, processes: Processes, tokenizer_digest: str
) -> tuple[S, str]:
    """The state of the newest checkpoint in `out`, else the starting one, and what to call it. Raises WeightsError."""
    state, saved = backend.init_state(run), newest_checkpoint(out, processes)
    if saved is None:
        return state, f"the starting weights ({what_is_there(out)})"
    return restored(backend, run, state, saved, processes=processes, tokenizer_digest=tokenizer_digest)


def newest_checkpoint(out: Path, processes: Processes) -> Path | None:
    """The newest checkpoint in `out` that the leader finds, for all processes."""
    found = latest(out)
    [name, *_] = processes.exchange(found.name if found else "")
    return checkpoints_of(out) / name if name else None


def restored(
    backend: States[S], run: Run, state: S, saved: Path, *, processes: Processes, tokenizer_digest: str
) -> tuple[S, str]:
    """`state` as it was when the checkpoint `saved` was taken, and what to call it; consumes `state`.

    Raises WeightsError for a damaged one: unlike a run that resumes, nobody asked for the one before it.
    """
    state = Formats(backend, run, processes).restore(state, saved)
    identity = read_origin(saved).identity
    is_another = identity is not None and identity.tokenizer != tokenizer_digest
    note = "; the tokenizer's files are not those that it was trained with" if is_another else ""
    return state, f"{saved.parent.parent} at step {state.step}{note}"


def what_is_there(out: Path) -> str:
    """Why there is no checkpoint to read: none was saved, or all are set aside."""
    names = ", ".join(path.name for path in aside(out))
    return (
        f"no whole checkpoint under {out}: set aside as damaged: {names}"
        if names
        else f"no checkpoint under {out}"
    )
