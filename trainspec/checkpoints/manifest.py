"""The manifest of a checkpoint: what it is of, and the digest of every file. It is written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainspec.checkpoints.folders import flush, naming
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.resume import CheckpointOrigin
from trainspec.errors import RecipeError, WeightsError
from trainspec.files.digests import BLAKE3, SHA256, algorithm_of
from trainspec.recipe import Recipe, recipe_from

FILE = "checkpoint.json"
PORTABLE, NATIVE = "portable", "native"
_DIGEST = "digest"
# The digests of versions that knew no other.
_SHA256 = "sha256"
_BLANK = "0" * 64


class DamagedError(WeightsError):
    """A checkpoint is not as it was written: `damage` says in what way, and the text also what to do."""

    def __init__(self, path: Path, damage: str) -> None:
        super().__init__(f"{damage}; rename or remove {path} to use the one before it")
        self.damage = damage


@dataclass(frozen=True)
class Manifest:
    """A run after `step` updates, which is also its position in the data.

    `digests` has that of every file of the checkpoint, by its path in it (`files.digests`, in parts of `part_bytes`; None:
    the SHA-256 of the whole, as versions wrote it that hashed in one thread), `sizes` their bytes; `shapes` every trained
    tensor (None: each file's keys are whole tensors, as versions wrote them that gathered); `identity` is None where a version
    without digests wrote it.
    """

    step: int
    recipe: dict[str, Any]
    digests: Mapping[str, str]
    identity: Identity | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    format: str = PORTABLE
    heldout_loss: float | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    part_bytes: int | None = None

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's directory with its own digest, and flush it to the disk."""
        path = folder / FILE
        text = json.dumps(asdict(self) | {_DIGEST: _BLANK}, indent=2) + "\n"
        with naming(path):
            path.write_text(text.replace(_BLANK, _digest(text)), encoding="utf-8")
        flush(path)

    def origin(self, path: Path) -> CheckpointOrigin:
        """How the checkpoint at `path` was made. Raises WeightsError for a recipe that this version does not know."""
        return CheckpointOrigin(path, self.step, _recipe_of(path, self.recipe), self.identity)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises DamagedError for an incomplete one, and where it is damaged.

    Raises WeightsError for one whose digests this version does not know.
    """
    with explained(path):
        text = (path / FILE).read_bytes().decode()
        tree = dict(json.loads(text))
        _check(tree, text, path / FILE)
        identity, shapes = tree.get("identity"), tree.get("shapes")
        return Manifest(
            step=int(tree["step"]),
            recipe=dict(tree["recipe"]),
            digests=_digests(tree, path),
            identity=Identity(**identity) if identity else None,
            shapes={name: tuple(map(int, s)) for name, s in shapes.items()} if shapes is not None else None,
            format=str(tree.get("format", PORTABLE)),
            heldout_loss=tree.get("heldout_loss"),
            backend=tree.get("backend"),
            versions=dict(tree.get("versions") or {}),
            sizes={str(name): int(size) for name, size in (tree.get("sizes") or {}).items()},
            part_bytes=_part_bytes(tree),
        )


def run_metadata(recipe: Mapping[str, Any], identity: Identity | None) -> dict[str, str]:
    """What the files of a checkpoint carry, so that one of another run is recognised: digests of its recipe and its inputs."""
    told = {"recipe": recipe} | ({"identity": asdict(identity)} if identity else {})
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for key, value in told.items()
    }


def _digests(tree: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The digest of every file. Raises WeightsError for one of a hash that this version does not know."""
    recorded = tree[_SHA256] if _SHA256 in tree else tree["digests"]
    found = {str(name): str(digest) for name, digest in recorded.items()}
    if unknown := {algorithm_of(digest) for digest in found.values()} - {SHA256, BLAKE3}:
        raise WeightsError(
            f"{path}: its digests are of {', '.join(sorted(unknown))}, which this version does not know; read it with the version that "
            "wrote it"
        )
    return found


def _part_bytes(tree: Mapping[str, Any]) -> int | None:
    """How long a part of a file is. Raises ValueError for what is no length."""
    length = tree.get("part_bytes")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"part_bytes {length!r}")
    return length


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Report missing files and keys, and values of another type, as an incomplete checkpoint."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(path, f"{path}: incomplete checkpoint ({_told(error)})") from None


def _told(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return f"{Path(str(error.filename)).name} is missing"
        case _Damaged():
            return str(error)
        case _:
            return f"{FILE} is damaged: {_in_words(error)}"


def _in_words(error: Exception) -> str:
    """What an error says of a text that is to be a manifest."""
    match error:
        case UnicodeDecodeError():
            return "it is not text"
        case json.JSONDecodeError():
            return f"it is not JSON (line {error.lineno})"
        case KeyError():
            return f"it has no {error.args[0]}"
        case _:
            return "a value in it is of another kind"


class _Damaged(ValueError):
    """The manifest is not the one that was written."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check(tree: Mapping[str, Any], text: str, path: Path) -> None:
    """Raises _Damaged unless the manifest is as it was written. Those of earlier versions have no digest."""
    known = {column.name for column in fields(Manifest)} | {_SHA256}
    digest = tree.get(_DIGEST)
    if digest is None and "sizes" not in tree and tree.keys() <= known:
        return
    if (
        not isinstance(digest, str)
        or text.count(digest) != 1
        or _digest(text.replace(digest, _BLANK)) != digest
    ):
        raise _Damaged(f"{path.name} is damaged: it is not as it was written")


def _recipe_of(path: Path, tree: dict[str, Any]) -> Recipe:
    try:
        return recipe_from(dict(tree))
    except RecipeError as error:
        raise WeightsError(f"{path}: holds a recipe that this version does not know: {error}") from None
