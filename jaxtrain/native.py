"""Checkpoints in orbax's format: native arrays as the run holds them, each process's part written by itself.

`trainspec checkpoint convert` starts this module as a program, in a process with JAX. docs/decisions/0031-native-formats.md says
what is in the files. Loaded only where a checkpoint has this format.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from numpy.typing import NDArray
from orbax.checkpoint import v1 as ocp
from tensorstore import open as open_array

from jaxtrain.precision import use_precision
from jaxtrain.storage import Storage
from jaxtrain.weights import Arrays, Layout, from_canonical, is_stacked, layouts
from trainspec.checkpoints.checkpoint import check_readable, load, way_out
from trainspec.checkpoints.folders import flush, remove
from trainspec.checkpoints.manifest import NATIVE, PORTABLE, DamagedError, Manifest, read_manifest
from trainspec.checkpoints.resume import check_loadable
from trainspec.checkpoints.shards import KINDS, ArrayKind, file_name
from trainspec.checkpoints.verify import verify
from trainspec.command import ArgumentParser, run_command
from trainspec.errors import RecipeError, UserError, WeightsError
from trainspec.files.digests import PART_BYTES, digest_of
from trainspec.files.tensors import write_tensors
from trainspec.plans.names import Backend
from trainspec.plans.pipeline import stack_order
from trainspec.plans.plan import STORED_DTYPE
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run, resolve
from trainspec.weight import Index, Weight

FOLDER = "native"
BACKEND: Backend = "jax"
# Where orbax puts the one tree of arrays that a checkpoint of ours is, and the part of it that a process has written.
_TREE = "state"
# Smaller chunks cost more than they save; orbax warns of them.
_CHUNK_BYTES = 2**20
_PROCESS_FOLDER = re.compile(r"ocdbt\.process_(\d+)")
Native = Mapping[ArrayKind, Arrays]
S = TypeVar("S")


class NativeFormat(Generic[S]):
    """Writes and reads `arrays_of(state)` with orbax; `replaced(state, step, load)` is the state with what `load` gives."""

    name = NATIVE

    def __init__(
        self,
        run: Run,
        processes: Processes,
        *,
        storage_of: Callable[[S], Storage],
        arrays_of: Callable[[S], Native],
        replaced: Callable[[S, int, Callable[[], Native]], S],
    ) -> None:
        self._run, self._processes = run, processes
        self._storage_of, self._arrays_of, self._replaced = storage_of, arrays_of, replaced

    def prepare(self, state: S) -> None:
        """orbax makes its own copies."""

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Start orbax's save, which has copied the arrays when this returns; the function that is returned waits for its end.

        orbax's processes agree in the main thread, and meet at barriers of JAX's coordinator afterwards. Raises WeightsError
        for a value that is not finite.
        """
        arrays = self._arrays_of(state)
        try:
            _check_finite(folder, arrays)
        except WeightsError:
            if self._processes.is_leader:
                remove(folder)
            raise
        saving = _save(folder / FOLDER, arrays, self._storage_of(state).layouts(self._run.trained))

        def finish() -> dict[str, str]:
            saving.result()
            return _digests(folder, self._processes.index)

        return finish

    def restore(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken, each process with its devices' shards; consumes `state`.

        Raises WeightsError for a damaged file and RecipeError where the run's native arrays are others.
        """
        manifest, storage = read_manifest(path), self._storage_of(state)
        verify(path)
        check_loadable(manifest.origin(path), self._run)
        check_readable(path, BACKEND)
        _check_layouts(path, _layouts_in(path), storage.layouts(self._run.trained))
        shapes = storage.saved_shapes(self._run.trained)
        return self._replaced(state, manifest.step, lambda: ocp.load(str(path / FOLDER), shapes))


def _save(folder: Path, arrays: Native, held: Mapping[str, Layout]) -> ocp.AsyncResponse[None]:
    context = ocp.Context()
    # Random bits do not become fewer, and zstd would take longer than the disk.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunk_of_a_layer
    with context:
        described: Any = {name: asdict(layout) for name, layout in held.items()}
        return ocp.save_async(str(folder), dict(arrays), custom_metadata={"layouts": described})


def _digests(folder: Path, process: int) -> dict[str, str]:
    """The digests of the files that a process has written; the leader's are also those that orbax writes once."""
    digests = {}
    for path in sorted(p for p in (folder / FOLDER).rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        part = _PROCESS_FOLDER.search(name)
        if (int(part[1]) if part else 0) == process:
            with path.open("rb") as file:
                digests[name] = digest_of(file)
    return digests


def _chunk_of_a_layer(
    key: Sequence[Any], value: Any
) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Large stacks are stored layer by layer: who reads one layer, or another stage's, then reads no other."""
    layers, *inner = value.sharding.shard_shape(value.shape)
    layer_bytes = math.prod(inner) * value.dtype.itemsize
    name = jax.tree_util.keystr(tuple(key[-1:]), simple=True)
    if layers == 1 or layer_bytes < _CHUNK_BYTES or not is_stacked(name):
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=layer_bytes, shard_axes=(0,))


@jax.jit
def _finite(arrays: Native) -> dict[ArrayKind, Arrays]:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def _check_finite(folder: Path, arrays: Native) -> None:
    """Raises WeightsError for a value that is not finite, in all processes alike."""
    for kind, of_kind in jax.device_get(_finite(arrays)).items():
        for name, is_finite in of_kind.items():
            if not is_finite:
                raise WeightsError(f"{folder}: {kind} of {name} is not finite; no checkpoint was written")


def _layouts_in(path: Path) -> dict[str, Layout]:
    """What the native arrays of the checkpoint at `path` hold. Raises DamagedError where it does not say."""
    try:
        metadata: Any = ocp.metadata(str(path / FOLDER)).custom_metadata
        described = dict(metadata["layouts"])
        return {
            name: Layout(**fields | {"weights": tuple(fields["weights"])})
            for name, fields in described.items()
        }
    except (ValueError, KeyError, TypeError, OSError):
        raise DamagedError(
            path, f"{path}: {FOLDER} does not say which weights it holds, as jaxtrain's do"
        ) from None


def _check_layouts(path: Path, saved: Mapping[str, Layout], wanted: Mapping[str, Layout]) -> None:
    """Raises RecipeError where the run's stacks have their layers in another order."""
    for name, layout in wanted.items():
        if saved.get(name) != layout:
            raise RecipeError(
                f"{path}: {name} has {_slots(saved.get(name))}, and {_slots(layout)} under this plan; resume under the plan that "
                f"it was made with, or {way_out(path)}"
            )


def _slots(layout: Layout | None) -> str:
    if layout is None:
        return "no layers"
    numbers = [re.search(r"layers\.(\d+)\.", name) if name else None for name in layout.weights]
    return f"layers {' '.join(match[1] if match else '-' for match in numbers)}"


def convert(source: Path, target: Path) -> str:
    """Write the checkpoint at `source`, of either format, as one of the other at `target`; returns the new format.

    A native one becomes portable weight by weight. A portable one becomes native under the plan of its recipe, and is whole in
    memory meanwhile. Raises WeightsError for a damaged file, UserError where `target` is there.
    """
    if target.exists():
        raise UserError(f"{target}: is there already; give another directory")
    verify(source)
    manifest, unfinished = read_manifest(source), target.with_name(f".{target.name}.tmp")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        digests = (
            _to_portable(source, manifest, unfinished)
            if manifest.format == NATIVE
            else _to_native(source, unfinished)
        )
        format_ = PORTABLE if manifest.format == NATIVE else NATIVE
        backend = BACKEND if format_ == NATIVE else manifest.backend
        sizes = {name: (unfinished / name).stat().st_size for name in digests}
        replace(
            manifest, format=format_, backend=backend, digests=digests, sizes=sizes, part_bytes=PART_BYTES
        ).write(unfinished)
        unfinished.rename(target)
        flush(target.parent)
    except BaseException:
        remove(unfinished)
        raise
    return format_


def _to_portable(source: Path, manifest: Manifest, folder: Path) -> dict[str, str]:
    held, digests = _layouts_in(source), {}
    for kind in KINDS:
        weights = {
            weight: _weight(source, kind, name, slot, layout)
            for name, layout in held.items()
            for slot, weight in enumerate(layout.weights)
            if weight is not None
        }
        if manifest.shapes is not None and {n: w.shape for n, w in weights.items()} != dict(manifest.shapes):
            raise WeightsError(f"{source}: {kind}: not the tensors that its manifest names")
        path = folder / file_name(kind, 0, 1)
        digests[path.name] = write_tensors(weights, path)
    return digests


def _weight(source: Path, kind: ArrayKind, name: str, slot: int, layout: Layout) -> Weight:
    """One canonical weight in orbax's files, read on demand."""
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{(source / FOLDER / _TREE).resolve()}/"},
            "path": f"{kind}.{name}/",
        },
    }
    array = open_array(spec, open=True, read=True).result()
    shape = array.shape[1:] if layout.is_stacked else array.shape

    def read(index: Index) -> NDArray[Any]:
        part = np.asarray(array[layout.slice_of(slot, index)].read().result())
        return part.T if layout.is_transposed else part

    return Weight(tuple(shape[::-1] if layout.is_transposed else shape), array.dtype.numpy_dtype, read)


def _to_native(source: Path, folder: Path) -> dict[str, str]:
    run = resolve(read_manifest(source).origin(source).recipe)
    use_precision(run.recipe.precision.policy)
    checkpoint, order = load(source, run), stack_order(run.recipe.plan, run.spec.layers)
    held, here = layouts(run.trained, order=order), SingleDeviceSharding(jax.devices()[0])
    arrays: dict[ArrayKind, Arrays] = {
        kind: from_canonical(
            ((p, getattr(checkpoint, kind)[p.name]) for p in run.trained),
            order=order,
            shardings=dict.fromkeys(held, here),
            dtype=STORED_DTYPE[run.recipe.precision.policy],
        )
        for kind in KINDS
    }
    _save(folder / FOLDER, arrays, held).result()
    return _digests(folder, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """`convert` as a command."""
    parser = ArgumentParser(
        prog="jaxtrain.native", description="write a checkpoint in the other format, native or portable"
    )
    for name in ("source", "target"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help=f"the directory of the {name} checkpoint"
        )
    return run_command(_main, parser, argv)


def _main(args: Namespace) -> None:
    print(f"wrote {args.target}, {convert(args.source, args.target)}")


if __name__ == "__main__":
    sys.exit(main())
