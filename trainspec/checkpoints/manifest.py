"""The manifest of a checkpoint: what it is of, and the digest of every file. It is written last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainspec.checkpoints.folders import flush
from trainspec.errors import RecipeError, WeightsError
from trainspec.recipe import Recipe, recipe_from
from trainspec.runs.identity import Identity
from trainspec.runs.resume import CheckpointOrigin

FILE = "checkpoint.json"
PORTABLE, NATIVE = "portable", "native"


@dataclass(frozen=True)
class Manifest:
    """A run after `step` updates, which is also its position in the data.

    `sha256` has every file of the checkpoint, by its path in it; `shapes` every trained tensor (None: each file's keys are
    whole tensors, as versions wrote them that gathered); `identity` is None where a version without digests wrote it.
    """

    step: int
    recipe: dict[str, Any]
    sha256: Mapping[str, str]
    identity: Identity | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    format: str = PORTABLE
    heldout_loss: float | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's directory, and flush it to the disk."""
        path = folder / FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        flush(path)

    def origin(self, path: Path) -> CheckpointOrigin:
        """How the checkpoint at `path` was made. Raises WeightsError for a recipe that this version does not know."""
        return CheckpointOrigin(path, self.step, _recipe_of(path, self.recipe), self.identity)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises WeightsError for an incomplete one."""
    with whole(path):
        tree = dict(json.loads((path / FILE).read_text(encoding="utf-8")))
        identity, shapes = tree.get("identity"), tree.get("shapes")
        return Manifest(
            step=int(tree["step"]),
            recipe=dict(tree["recipe"]),
            sha256={str(name): str(digest) for name, digest in tree["sha256"].items()},
            identity=Identity(**identity) if identity else None,
            shapes={name: tuple(map(int, s)) for name, s in shapes.items()} if shapes is not None else None,
            format=str(tree.get("format", PORTABLE)),
            heldout_loss=tree.get("heldout_loss"),
            backend=tree.get("backend"),
            versions=dict(tree.get("versions") or {}),
        )


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Report missing files and keys, and values of another type, as an incomplete checkpoint."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path}: incomplete checkpoint ({type(error).__name__}); remove it to use the one before it"
        ) from None


def _recipe_of(path: Path, tree: dict[str, Any]) -> Recipe:
    try:
        return recipe_from(dict(tree))
    except RecipeError as error:
        raise WeightsError(f"{path}: holds a recipe that this version does not know: {error}") from None
