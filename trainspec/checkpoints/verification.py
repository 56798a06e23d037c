"""Whether a checkpoint is whole: everything that is wrong with it, where loading stops at the first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from trainspec.checkpoints.manifest import PORTABLE, Manifest, read_manifest
from trainspec.checkpoints.shards import KINDS, ShardFiles, files_of
from trainspec.errors import WeightsError


def damages(path: Path) -> list[str]:
    """A line for each thing that is wrong with the checkpoint at `path`; empty for a whole one. Reads every byte of it."""
    try:
        manifest = read_manifest(path)
    except WeightsError as error:
        return [str(error)]
    lines = list(_damaged_files(path, manifest))
    return lines or list(_wrong_shards(path, manifest))


def _damaged_files(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, digest in sorted(manifest.sha256.items()):
        file = path / name
        if not file.is_file():
            yield f"{file}: missing"
            continue
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                what = "damaged (its SHA-256 is not the recorded one)" if file.stat().st_size else "empty"
                yield f"{file}: {what}"


def _wrong_shards(path: Path, manifest: Manifest) -> Iterator[str]:
    """What the files say of themselves: every element of every tensor once, and moments of the weights' shapes."""
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
