"""The newest state of a run's directory, for those that read it and change nothing: evaluation and generation."""

from __future__ import annotations

from pathlib import Path

from trainspec.checkpoints.checkpoint import read_origin
from trainspec.checkpoints.folders import checkpoints_of, latest, names_aside
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.states import S, States
from trainspec.errors import UserError
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run

STARTING = "the starting weights"


def newest_state(
    backend: States[S], run: Run, *, out: Path | None, processes: Processes, tokenizer_digest: str
) -> tuple[S, str]:
    """The state of the newest checkpoint in `out`, the starting one where that is None, and what to call it.

    Raises UserError where there is no checkpoint, WeightsError for a damaged one.
    """
    saved = newest_checkpoint(out, processes)
    state = backend.init_state(run)
    if saved is None:
        return state, STARTING
    return restored(backend, run, state, saved, processes=processes, tokenizer_digest=tokenizer_digest)


def newest_checkpoint(out: Path | None, processes: Processes) -> Path | None:
    """The newest checkpoint in `out` that the leader finds, for all processes; None without `out`.

    Raises UserError where there is none.
    """
    if out is None:
        return None
    found = latest(out)
    [name, *_] = processes.exchange(found.name if found else "")
    if not name:
        raise UserError(nothing_there(out))
    return checkpoints_of(out) / name


def check_there(out: Path | None) -> Path | None:
    """What `newest_checkpoint` says, of this process alone, before there are others."""
    return newest_checkpoint(out, Processes())


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


def nothing_there(out: Path) -> str:
    """Why there is no checkpoint to read (none was saved, or all are set aside), and the way out."""
    if names := names_aside(out):
        why = f"no whole checkpoint under {out}: set aside as damaged: {names}"
    else:
        why = f"no checkpoint under {out}{'' if out.exists() else ', which does not exist'}"
    return f"{why}; name the --out of a run that saved one, or give --untrained for the model that the recipe starts from"
