"""Which checkpoints are kept, and what `latest` and `best` stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainspec.checkpoints import folders
from trainspec.checkpoints.manifest import read_manifest
from trainspec.errors import WeightsError
from trainspec.recipe import Checkpoint as CheckpointSettings


def apply(out: Path, settings: CheckpointSettings) -> None:
    """Point the names at the newest and the best checkpoint, then remove all that nothing keeps, oldest first."""
    paths = folders.complete(out)
    best = best_of(paths) if settings.keep_best else []
    folders.point(out, folders.LATEST, paths[-1] if paths else None)
    folders.point(out, folders.BEST, best[0] if best else None)
    keep = kept(paths, settings, best)
    for path in paths:
        if path not in keep:
            folders.remove(path)


def point_again(out: Path) -> None:
    """Point the names that are there at the newest and the best of the checkpoints that are left."""
    paths = folders.complete(out)
    for name, wanted in ((folders.LATEST, paths[-1:]), (folders.BEST, best_of(paths)[:1])):
        if folders.is_pointed(out, name):
            folders.point(out, name, wanted[0] if wanted else None)


def kept(paths: Sequence[Path], settings: CheckpointSettings, best: Sequence[Path]) -> set[Path]:
    """Those of `paths`, oldest first, that the recipe keeps; `best` are those with a held-out loss, the lowest first."""
    every = settings.keep_every_steps
    for_good = {path for path in paths if every and (folders.step_of(path) or 0) % every == 0}
    return {*paths[-settings.keep :], *best[: settings.keep_best], *for_good}


def best_of(paths: Sequence[Path]) -> list[Path]:
    """Those of which the held-out loss is known, the lowest first; of equal ones the newest."""
    measured = [(loss, path) for path in reversed(paths) if (loss := _heldout_loss(path)) is not None]
    return [path for _, path in sorted(measured, key=lambda pair: pair[0])]


def _heldout_loss(path: Path) -> float | None:
    try:
        return read_manifest(path).heldout_loss
    except WeightsError:  # damaged: a run that resumes says so
        return None
