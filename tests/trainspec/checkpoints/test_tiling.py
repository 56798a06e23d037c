"""Tensors cut into boxes over several files are read as the whole tensors they are; what overlaps or is missing is refused."""

from __future__ import annotations

import errno
import math
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from trainspec.checkpoints.shards import ShardFiles, boxes, everything, key_of
from trainspec.errors import WeightsError
from trainspec.files import tensors
from trainspec.files.tensors import TensorFile, write_tensors
from trainspec.weight import Weight

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def cut(rng: np.random.Generator, box: tuple[slice, ...], times: int) -> list[tuple[slice, ...]]:
    """A random partition of a box into boxes."""
    found = [box]
    for _ in range(times):
        which, dim = rng.integers(len(found)), rng.integers(max(1, len(box)))
        part = found[which]
        if not part or part[dim].stop - part[dim].start < 2:
            continue
        at = int(rng.integers(part[dim].start + 1, part[dim].stop))
        found[which] = (*part[:dim], slice(part[dim].start, at), *part[dim + 1 :])
        found.append((*part[:dim], slice(at, part[dim].stop), *part[dim + 1 :]))
    return found


def a_tensor(rng: np.random.Generator, name: str, files: list[dict[str, np.ndarray]]) -> np.ndarray:
    """A tensor of random shape and type, its boxes spread over the files."""
    shape = tuple(int(size) for size in rng.integers(1, 7, rng.integers(0, 4)))
    whole = rng.normal(size=shape).astype(DTYPES[rng.integers(len(DTYPES))])
    for index in cut(rng, everything(shape), int(rng.integers(0, 9))):
        files[rng.integers(len(files))][key_of(name, shape, index)] = whole[index].copy()
    return whole


@pytest.mark.parametrize("seed", range(20))
def test_any_partition_is_read_as_the_whole(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    files: list[dict[str, np.ndarray]] = [{} for _ in range(rng.integers(1, 5))]
    wholes = {name: a_tensor(rng, name, files) for name in ("a", "layers.0.b", "c")}
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(files))]
    for path, arrays in zip(paths, files, strict=True):
        write_tensors(arrays, path)
    shapes = {name: whole.shape for name, whole in wholes.items()}
    found = ShardFiles(paths, shapes, where=tmp_path)
    for name, whole in wholes.items():
        assert found.dtypes[name] == whole.dtype
        for _ in range(5):
            index = tuple(slice(*sorted(rng.integers(0, size + 1, 2))) for size in whole.shape)
            assert np.array_equal(found.read(name, index), whole[index])
        assert np.array_equal(found.read(name, everything(whole.shape)), whole)
    # Controls: a box less, and a box twice.
    owner = next(i for i, arrays in enumerate(files) if arrays)
    key, array = next(iter(files[owner].items()))
    write_tensors({k: v for k, v in files[owner].items() if k != key}, paths[owner])
    lost = ShardFiles(paths, shapes, where=tmp_path) if key in wholes else None
    if lost is None:
        with pytest.raises(WeightsError, match="no file has all of"):
            ShardFiles(paths, shapes, where=tmp_path)
    else:
        assert key not in lost.shapes
    write_tensors(files[owner], paths[owner])
    write_tensors({key: array}, tmp_path / "again.safetensors")
    with pytest.raises(WeightsError, match="several files have the same"):
        ShardFiles([*paths, tmp_path / "again.safetensors"], shapes, where=tmp_path)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (3, 1, 5)])
def test_a_stretch_of_elements_is_its_boxes(shape: tuple[int, ...]):
    size = math.prod(shape)
    flat = np.arange(size).reshape(shape)
    for first in range(size):
        for end in range(first, size + 1):
            if shape == () and end == first:
                continue
            found = [flat[index].reshape(-1) for index in boxes(shape, first, end)]
            assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(first, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"a[0:2,0:3]": (2, 3), "a[2:5,0:3]": (3, 3)}, "lies outside of its shape"),
        ({"a[0:2,0:3]": (1, 3)}, "which is not what its name says"),
        ({"a": (4, 3), "z": (1,)}, "z is unexpected"),
        ({"a[0:2,0:3]x": (2, 3)}, "unexpected"),
        ({"a[0:2]": (2,)}, "which is not what its name says"),
    ],
)
def test_what_the_names_say_is_checked(tmp_path: Path, keys: dict[str, tuple[int, ...]], message: str):
    write_tensors({k: np.ones(shape, np.float32) for k, shape in keys.items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message):
        ShardFiles([tmp_path / "a.safetensors"], {"a": (4, 3)}, where=tmp_path)


def test_a_slice_of_any_form_is_read(tmp_path: Path):
    """Rows longer than a block, of which a part is read, and shorter ones, which are read in blocks."""
    rng = np.random.default_rng(0)
    wide = 2 * tensors._BLOCK_BYTES // 4
    arrays = {"wide": rng.normal(size=(3, wide)), "deep": rng.normal(size=(5, 2, 40_000)), "long": rng.normal(size=(9000, 6)), "one": rng.normal(size=())}  # fmt: skip
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    save_file(arrays, tmp_path / "theirs.safetensors")
    file = TensorFile(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(file.read(name), array)
        for _ in range(20):
            bounds = [sorted(rng.integers(0, size + 1, 2)) for size in array.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            assert np.array_equal(file.read(name, index), array[index])
    assert np.array_equal(
        file.read("long", (slice(5, None, 3), slice(None, None, 2))), arrays["long"][5::3, ::2]
    )


def test_no_more_files_are_open_than_the_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "_MOST_OPEN", 3)
    files = []
    for number in range(10):
        write_tensors({"a": np.full(3, number, np.float32)}, tmp_path / f"{number}.safetensors")
        files.append(TensorFile(tmp_path / f"{number}.safetensors"))
    assert [file.read("a")[0] for file in files] == list(range(10))
    assert len(tensors._OPEN) == 3
    write_tensors({"a": np.full(3, 70, np.float32)}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tmp_path / "0.safetensors")
    with pytest.raises(WeightsError, match="has changed since it was first opened"):
        files[0].read("a")
    kept = files[9].read("a")  # open still: the file that it was
    (tmp_path / "9.safetensors").unlink()
    assert np.array_equal(files[9].read("a"), kept)


def test_few_tensors_are_in_memory_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of twelve that are made on demand, one is made while parts of the ones before are written."""
    size = 2**20
    monkeypatch.setattr(tensors, "THREADS", 2)

    def peak(arrays: dict[str, Weight], keep: bool) -> float:
        tracemalloc.start()
        held = [weight[...] for weight in arrays.values()] if keep else []
        write_tensors(arrays, tmp_path / "a.safetensors")
        found = tracemalloc.get_traced_memory()[1] / (4 * size)
        tracemalloc.stop()
        assert len(held) == keep * len(arrays)
        return found

    ones = {
        str(i): Weight((size,), np.dtype(np.float32), lambda _: np.ones(size, np.float32)) for i in range(12)
    }
    assert 1 <= peak(ones, False) < 4
    assert peak(ones, True) > 12  # control


def test_what_was_written_is_looked_at_and_what_is_not_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, arrays = tmp_path / "a.safetensors", {"a": np.ones(5_000_000, np.float32)}
    digest = write_tensors(arrays, path)
    assert write_tensors(arrays, path, flush=False) == digest
    write = tensors._write

    def losing(file, parts):
        samples, digest = write(file, parts)
        file.seek(samples[1].offset)
        file.write(b"\0" * 4096)
        return samples, digest

    monkeypatch.setattr(tensors, "_write", losing)
    with pytest.raises(OSError, match="does not read back as written") as caught:
        write_tensors(arrays, path)
    assert caught.value.filename == str(path)
    assert not path.exists()


def test_an_error_of_the_disk_names_the_file_that_it_is_of(tmp_path: Path):
    """A tensor may be read from another file while this one is written."""
    source, path = tmp_path / "source.safetensors", tmp_path / "a.safetensors"

    def write(error: OSError) -> str:
        def read(_: object) -> np.ndarray:
            raise error

        with pytest.raises(OSError, match="Input/output error") as caught:
            write_tensors({"a": Weight((3,), np.dtype(np.float32), read)}, path)
        assert not path.exists()
        assert caught.value.errno == errno.EIO
        return caught.value.filename

    assert write(OSError(errno.EIO, "Input/output error", str(source))) == str(source)
    assert write(OSError(errno.EIO, "Input/output error")) == str(path)
