"""Checkpoints of arrays that a test has whole in memory, written as a run of one process writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainspec.checkpoints import folders
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.manifest import PORTABLE
from trainspec.checkpoints.portable import metadata_of, write_shards
from trainspec.checkpoints.shards import KINDS, as_shards
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.recipe import Recipe
from trainspec.runs.processes import Processes


class WholeArrays:
    """Writes the arrays of a `Checkpoint` in the portable format."""

    name = PORTABLE

    def __init__(self, recipe: Recipe, identity: Identity | None) -> None:
        self._recipe, self._identity = recipe, identity

    def prepare(self, state: Checkpoint) -> None:
        pass

    def begin(self, folder: Path, state: Checkpoint) -> Callable[[], dict[str, str]]:
        shards = [
            s for kind in KINDS for s in as_shards(kind, {n: w[...] for n, w in getattr(state, kind).items()})
        ]
        metadata = metadata_of(state.step, self._recipe, self._identity)
        return lambda: write_shards(folder, shards, Processes(), metadata=metadata)

    def restore(self, state: Checkpoint, path: Path) -> Checkpoint:
        raise AssertionError(f"{path} is read with `load`")


def save_checkpoint(
    out: Path, checkpoint: Checkpoint, *, recipe: Recipe, identity: Identity | None = None
) -> Path:
    """Save whole arrays, and wait for it; returns the checkpoint's directory. Raises what the store raises."""
    manifest = manifest_of(recipe, identity, {name: w.shape for name, w in checkpoint.weights.items()})
    store = CheckpointStore(out, WholeArrays(recipe, identity), manifest, recipe.checkpoint, Processes())
    store.save(checkpoint)
    store.wait()
    return folders.checkpoints_of(out) / folders.checkpoint_name(checkpoint.step)
