"""Whether a checkpoint is whole, in its files and in what they say of themselves: everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainspec.checkpoints.manifest import PORTABLE, read_manifest
from trainspec.checkpoints.shards import KINDS, ShardFiles, files_of
from trainspec.checkpoints.verify import damages
from trainspec.errors import WeightsError


def damages_of(path: Path) -> list[str]:
    """A line for each thing that is wrong with the checkpoint at `path`; empty for a whole one. Reads every byte of it."""
    return damages(path) or list(_wrong_shards(path))


def _wrong_shards(path: Path) -> Iterator[str]:
    """What the files say: every element of every tensor once, and moments of the weights' shapes."""
    manifest = read_manifest(path)
    if manifest.format != PORTABLE:
        return
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for kind in KINDS:
        files = [path / name for name in files_of(kind, manifest.sha256)]
        try:
            found[kind] = ShardFiles(files, manifest.shapes, where=path).shapes
        except WeightsError as error:
            yield str(error)
    wanted = manifest.shapes if manifest.shapes is not None else found.get(KINDS[0], {})
    for kind, shapes in found.items():
        for name in sorted(wanted.keys() ^ shapes.keys()):
            yield f"{path}: {kind} of {name} {'is missing' if name in wanted else 'is unexpected'}"
        for name in sorted(wanted.keys() & shapes.keys()):
            if wanted[name] != shapes[name]:
                yield f"{path}: {kind} of {name} has shape {list(shapes[name])}, not {list(wanted[name])}"
