"""Whether the files of a checkpoint, each of them as it was written, are together all that there has to be.

One function for whoever asks: a save before it counts, `trainspec checkpoint verify`, and a resume before it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainspec.checkpoints.manifest import PORTABLE, Manifest
from trainspec.checkpoints.shards import KINDS, ShardFiles, files_of
from trainspec.errors import WeightsError


def wrong_shards(path: Path, manifest: Manifest) -> Iterator[str]:
    """A line for everything that is wrong: every element has to be there once, and moments have their weights' shapes.

    Reads headers only; a native format's are its backend's business.
    """
    if manifest.format != PORTABLE:
        return
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for kind in KINDS:
        files = [path / name for name in files_of(kind, manifest.digests)]
        if not files:
            yield f"{path}: incomplete checkpoint: no file of {kind}"
            continue
        try:
            found[kind] = ShardFiles(files, manifest.shapes, where=path).shapes
        except WeightsError as error:
            yield str(error)
    wanted = manifest.shapes if manifest.shapes is not None else found.get(KINDS[0], {})
    for kind, shapes in found.items():
        for name in sorted(wanted.keys() - shapes.keys()):
            yield f"{path}: no process has written {kind} of {name}"
        for name in sorted(shapes.keys() - wanted.keys()):
            yield f"{path}: {kind} of {name} is unexpected"
        for name in sorted(wanted.keys() & shapes.keys()):
            if wanted[name] != shapes[name]:
                yield f"{path}: {kind} of {name} has shape {list(shapes[name])}, not {list(wanted[name])}"
