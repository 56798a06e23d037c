"""What is in a checkpoint: step, data position, who wrote it and under which plan, its arrays and its files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainspec.checkpoints.manifest import FILE, PORTABLE, Manifest, explained, read_manifest
from trainspec.checkpoints.shards import KINDS, ArrayKind, ShardFiles, files_of
from trainspec.complaint import format_value
from trainspec.plans.plan import MESH_AXES

# How many processes wrote a portable checkpoint, and which one a file of a native one: orbax's names.
_COUNT, _PROCESS = re.compile(r"-\d{5}-of-(\d{5})\."), re.compile(r"/ocdbt\.process_(\d+)/")


@dataclass(frozen=True)
class ArraySummary:
    """The arrays of one kind: how many tensors, of how many parameters together, and in which stored types."""

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """A checkpoint's facts. `examples` is its data position: as many of the order of `seed` were trained on.

    `recipe` is the SHA-256 of the recipe as JSON; `files` are by name, in bytes. `backend`, `versions` and `identity` are empty
    where an earlier version wrote it.
    """

    path: str
    step: int
    examples: int
    seed: int
    heldout_loss: float | None
    format: str
    backend: str | None
    versions: Mapping[str, str]
    processes: int
    plan: Mapping[str, Any]
    precision: str
    model: str
    method: Mapping[str, Any]
    recipe: str
    identity: Mapping[str, str]
    arrays: Mapping[str, ArraySummary]
    files: Mapping[str, int]

    def as_json(self) -> str:
        """All of it, as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield self.path
        loss = "not measured" if self.heldout_loss is None else f"{self.heldout_loss:.6f}"
        made_with = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        rows: list[tuple[str, str]] = [
            ("step", f"{self.step}, after {self.examples:,} examples of the order of run.seed={self.seed}"),
            ("held-out loss", loss),
            ("format", self.format),
            ("written by", " with ".join(filter(None, (self.backend or "an earlier version", made_with)))),
            ("processes", str(self.processes)),
            ("plan", ", ".join(self._plan())),
            ("precision", self.precision),
            ("model", self.model),
            ("method", ", ".join(self._method())),
            ("recipe", f"SHA-256 {self.recipe}"),
            *((f"digest of {name}", digest or "none") for name, digest in self.identity.items()),
            *(
                (kind, ", ".join((f"{a.tensors} tensors", f"{a.parameters:,} parameters", *a.dtypes)))
                for kind, a in self.arrays.items()
            ),
            ("files", f"{len(self.files)}, {sum(self.files.values()):,} bytes together"),
        ]
        yield from _columns(rows, indent=2)
        yield from _columns([(name, f"{size:,} bytes") for name, size in self.files.items()], indent=4)

    def _method(self) -> Iterator[str]:
        yield self.method["kind"]
        for key, value in self.method.items():
            if key != "kind" and value is not None:
                yield f"{key}={format_value(value)}"

    def _plan(self) -> Iterator[str]:
        yield (
            " × ".join(f"{axis} {n}" for axis in MESH_AXES if (n := self.plan.get(axis, 1)) > 1)
            or "one device"
        )
        yield f"shards {self.plan.get('shards', 'nothing')}"


def _columns(rows: Sequence[tuple[str, str]], *, indent: int) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    return (f"{'':<{indent}}{name:<{width}}  {text}" for name, text in rows)


def summary_of(path: Path) -> Summary:
    """The facts of the checkpoint at `path`, of which only headers are read. Raises WeightsError for an incomplete one."""
    manifest = read_manifest(path)
    with explained(path):
        tree = manifest.recipe
        sizes = {name: (path / name).stat().st_size for name in sorted({FILE, *manifest.digests})}
        counts = {int(match[1]) for name in sizes if (match := _COUNT.search(name))}
        counts |= {1 + int(match[1]) for name in sizes if (match := _PROCESS.search(name))}
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return Summary(
            path=str(path),
            step=manifest.step,
            examples=manifest.step * tree["batch"]["global_examples"],
            seed=tree["run"]["seed"],
            heldout_loss=manifest.heldout_loss,
            format=manifest.format,
            backend=manifest.backend,
            versions=manifest.versions,
            processes=max(counts, default=1),
            plan=tree["plan"],
            precision=tree["precision"]["policy"],
            model=tree["model"]["from"],
            method=tree["method"],
            recipe=hashlib.sha256(text.encode()).hexdigest(),
            identity=asdict(manifest.identity) if manifest.identity else {},
            arrays=_arrays(path, manifest),
            files=sizes,
        )


def _arrays(path: Path, manifest: Manifest) -> dict[str, ArraySummary]:
    if manifest.format != PORTABLE:  # only the backend that wrote the files reads them
        shapes = manifest.shapes or {}
        one = ArraySummary(len(shapes), sum(map(math.prod, shapes.values())), ())
        return dict.fromkeys(KINDS, one)
    return {kind: _summed(path, kind, manifest) for kind in KINDS}


def _summed(path: Path, kind: ArrayKind, manifest: Manifest) -> ArraySummary:
    files = [path / name for name in files_of(kind, manifest.digests)]
    tensors = ShardFiles(files, manifest.shapes, where=path)
    return ArraySummary(
        tensors=len(tensors.shapes),
        parameters=sum(map(math.prod, tensors.shapes.values())),
        dtypes=tuple(sorted({str(dtype) for dtype in tensors.dtypes.values()})),
    )
