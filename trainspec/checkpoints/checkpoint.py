"""A checkpoint that was read, whoever wrote it: verified, and opened in the precision of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainspec.checkpoints.folders import latest, names_aside
from trainspec.checkpoints.manifest import PORTABLE, read_manifest
from trainspec.checkpoints.resume import CheckpointOrigin, check_loadable
from trainspec.checkpoints.shards import KINDS, ShardFiles, files_of
from trainspec.checkpoints.verify import verify
from trainspec.errors import RecipeError, WeightsError
from trainspec.files.hf import read_entries
from trainspec.plans.names import Backend
from trainspec.plans.plan import STORED_DTYPE
from trainspec.runs.run import Run
from trainspec.weight import WeightLike


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` updates: trained weights and moments. A loaded one is read slice by slice, on demand."""

    step: int
    weights: Mapping[str, WeightLike]
    moment1: Mapping[str, WeightLike]
    moment2: Mapping[str, WeightLike]


def resumable_checkpoint(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from. Raises RecipeError for one that would be started over, or that is not there."""
    newest = latest(out)
    if newest and not resume:
        raise RecipeError(
            f"{out}: holds {newest.name} of an earlier run; continue with --resume, or give another --out"
        )
    if resume and newest is None and (names := names_aside(out)):
        raise RecipeError(
            f"{out}: --resume found no whole checkpoint there: set aside as damaged: {names}; leave --resume out to start over"
        )
    if resume and newest is None:
        raise RecipeError(f"{out}: --resume found no checkpoint there; leave --resume out to start")
    return newest


def check_readable(path: Path | None, backend: Backend) -> None:
    """Raises RecipeError where the checkpoint at `path`, if there is one, is in another backend's native format."""
    if path is None:
        return
    try:
        manifest = read_manifest(path)
    except WeightsError:  # whoever loads it is told, or uses the one before it
        return
    if manifest.format != PORTABLE and manifest.backend != backend:
        raise RecipeError(
            f"{path}: is in the native format of {manifest.backend}, which {backend} does not read; resume there with "
            f"checkpoint.format=portable, or {way_out(path)}"
        )


def way_out(path: Path) -> str:
    """What makes a checkpoint of a native format one that every backend reads, under any plan."""
    return f"convert it: trainspec checkpoint convert {path} OUT --to portable"


def read_origin(path: Path) -> CheckpointOrigin:
    """How a checkpoint was made. Raises WeightsError for an incomplete one."""
    return read_manifest(path).origin(path)


def load(path: Path, run: Run) -> Checkpoint:
    """Verify a portable checkpoint and open it in the precision of `run`; weights are read slice by slice, on demand.

    Raises DamagedError where it is not whole and RecipeError for another model or method.
    """
    manifest = read_manifest(path)
    verify(path)
    check_loadable(manifest.origin(path), run)
    if manifest.format != PORTABLE:
        raise RecipeError(f"{path}: is in the native format of {manifest.backend}; {way_out(path)}")
    dtype = STORED_DTYPE[run.recipe.precision.policy]
    arrays = []
    for kind in KINDS:
        files = [path / name for name in files_of(kind, manifest.digests)]
        opened = ShardFiles(files, manifest.shapes, where=path)
        arrays.append(
            {p.name: weight for p, weight in read_entries(opened, run.trained, dtype=dtype, where=path)}
        )
    weights, moment1, moment2 = arrays
    return Checkpoint(manifest.step, weights, moment1, moment2)
