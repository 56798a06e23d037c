"""Safetensors files: written completely or not at all with the permissions of the user's umask, and read by byte range.

`write_tensors` holds one tensor in memory at a time; `save_tensors` is the library's own writer, which copies all of them.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from trainspec.errors import WeightsError
from trainspec.files.digests import ALGORITHM, PART_BYTES, THREADS, hash_of, joined_digest
from trainspec.weight import Index, Weight, WeightLike, blocks

# The types that weights may be stored in: safetensors' names and numpy's.
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
LFS_POINTER = b"version https://git-lfs"
# safetensors' own limit of a header.
_MOST_HEADER_BYTES = 100_000_000
# How much is written and hashed at a time: it stays in a core's cache.
_CHUNK_BYTES = 256 * 2**10
# So much is read back, once in so many bytes.
_SAMPLE_BYTES, _SAMPLED_BYTES = 4096, 8 * 2**20
# Tensors smaller than this are joined before they are written: a call takes longer than their data.
_SMALL_BYTES = 64 * 2**10
# Rows of which only a part is wanted are read whole, in blocks of so many bytes; of longer ones only that part is.
_BLOCK_BYTES = 64 * 2**10
# The sides of a tile of a matrix that is transposed.
_TILE = 64
# What is longer is read by several threads: the system has to clear the memory that it goes to, which takes longer than reading.
_ALONE_BYTES = 256 * 2**10
# Files that are open at a time, over all readers: systems allow a process some 1,000.
_MOST_OPEN = 64


def save_tensors(
    arrays: Mapping[str, NDArray[Any]], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `arrays`. Raises OSError with the path, and leaves no file, where the disk fails."""
    try:
        save_file(dict(arrays), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(None, f"not written: {error}", str(path)) from None
    # safetensors makes its files readable by the owner only; the user's umask should decide.
    path.chmod(0o666 & ~_umask())


def write_tensors(
    arrays: Mapping[str, WeightLike],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    flush: bool = True,
) -> str:
    """Write `arrays` one after the other and have them on the disk; returns the digest of the file (`digests`).

    The layout is that of safetensors' own writer: wider types first, then by name. Threads hash and write parts of it side by
    side. Of every 8 MiB the first 4 KiB are read back; a single bit that the disk has changed is found by its digest when
    the file is read. Raises OSError, and leaves no file, where the disk fails; it has the path, or that of the file from which
    a tensor was read.
    """
    try:
        with path.open("wb", buffering=0) as file:
            samples, digest = _write(file, _parts(_joined(_pieces(arrays, metadata))))
            if flush:
                os.fsync(file.fileno())
        _check_written(path, samples)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or "not written", error.filename or str(path)) from None
        raise
    return digest


def _pieces(arrays: Mapping[str, WeightLike], metadata: Mapping[str, str] | None) -> Iterator[memoryview]:
    """The bytes of a file: its header, and every tensor when it is asked for."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        array, begin = arrays[name], end
        end += math.prod(array.shape) * array.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        array = arrays[name]
        is_whole = not array.in_blocks if isinstance(array, Weight) else array.flags.c_contiguous
        for part in (...,) if is_whole else blocks(array.shape):
            yield row_major(array[part]).reshape(-1).view(np.uint8).data


def row_major(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, or a copy of it, in row-major order."""
    is_transposed = array.ndim == 2 and not array.flags.c_contiguous
    return transposed(array.T) if is_transposed else np.ascontiguousarray(array)


def transposed(array: NDArray[Any]) -> NDArray[Any]:
    """A copy of a matrix, transposed, in row-major order."""
    result = np.empty(array.shape[::-1], array.dtype)
    copy_into(result, array.T)
    return result


def copy_into(target: NDArray[Any], source: NDArray[Any]) -> None:
    """`target[...] = source`; a matrix that lies the other way tile by tile, which takes a fifth of numpy's time.

    A tile stays in the core's cache while it is read in one order and written in the other.
    """
    if source.ndim != 2 or source.flags.c_contiguous == target.flags.c_contiguous:
        target[...] = source
        return
    bits = f"u{target.dtype.itemsize}"  # numpy copies types that are not its own one by one
    target, source = target.view(bits), source.astype(target.dtype, copy=False).view(bits)
    rows, columns = source.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            target[tile] = source[tile]


def _joined(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in chunks: large pieces are cut and small ones joined."""
    small = bytearray()
    for piece in pieces:
        if len(piece) >= _SMALL_BYTES or len(small) + len(piece) > _CHUNK_BYTES:
            if small:
                yield memoryview(small)
            small = bytearray()
        if len(piece) < _SMALL_BYTES:
            small += piece
            continue
        for at in range(0, len(piece), _CHUNK_BYTES):
            yield piece[at : at + _CHUNK_BYTES]
    if small:
        yield memoryview(small)


class _Part(NamedTuple):
    """A part of a file, as its digest has them, and its first byte's place."""

    offset: int
    chunks: list[memoryview]


def _parts(chunks: Iterator[memoryview]) -> Iterator[_Part]:
    part, room = _Part(0, []), PART_BYTES
    for chunk in chunks:
        while chunk:
            part.chunks.append(chunk[:room])
            chunk, room = chunk[room:], room - len(part.chunks[-1])
            if not room:
                yield part
                part, room = _Part(part.offset + PART_BYTES, []), PART_BYTES
    if part.chunks:
        yield part


class _Sample(NamedTuple):
    """What was written at a place, to be read back."""

    offset: int
    size: int
    checksum: int


def _write(file: io.FileIO, parts: Iterator[_Part]) -> tuple[list[_Sample], str]:
    """Write and hash all parts, several at a time. Returns the file's digest and samples; the last of these is empty, at the end."""
    digests: list[bytes] = []
    samples: list[_Sample] = []
    waiting: deque[Future[bytes]] = deque()
    end = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for part in parts:
            if len(waiting) >= THREADS:  # so much of what is made on demand is in memory
                digests.append(waiting.popleft().result())
            waiting.append(pool.submit(_write_part, file.fileno(), part))
            if not samples or part.offset >= samples[-1].offset + _SAMPLED_BYTES:
                begin = part.chunks[0][:_SAMPLE_BYTES]
                samples.append(_Sample(part.offset, len(begin), zlib.crc32(begin)))
            end = part.offset + sum(map(len, part.chunks))
        digests += [each.result() for each in waiting]
    return [*samples, _Sample(end, 0, 0)], joined_digest(digests, ALGORITHM)


def _write_part(descriptor: int, part: _Part) -> bytes:
    """Write one part where it belongs, and hash each chunk when writing it has brought it into the cache: that is faster by half."""
    digest, offset = hash_of(ALGORITHM)(), part.offset
    for chunk in part.chunks:
        rest = chunk
        while rest:  # a call may write only a part
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count
        digest.update(chunk)
    return digest.digest()


def _check_written(path: Path, samples: list[_Sample]) -> None:
    """Raises OSError where the file does not have what was written; it is read from the disk where the system can be told to."""
    with path.open("rb", buffering=0) as file:
        for sample in samples:
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), sample.offset, sample.size, os.POSIX_FADV_DONTNEED)
            found = os.pread(file.fileno(), sample.size, sample.offset)
            if (len(found), zlib.crc32(found)) != (sample.size, sample.checksum):
                raise OSError(None, "does not read back as written; the disk may be full or failing")
        if os.fstat(file.fileno()).st_size != samples[-1].offset:
            raise OSError(None, "is not as long as what was written; the disk may be full or failing")


class Entry(NamedTuple):
    """A tensor in a file: its type in safetensors' words, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Handle:
    """A file that is open as long as somebody has this."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class TensorFile:
    """One safetensors file. The header is read and checked at once, data when it is asked for, by byte range.

    The file stays open between reads; of all such files the _MOST_OPEN last ones do. Raises WeightsError for a file that is
    missing, cut short, or no longer the one that it was.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stamp = path, None
        with _explained(path):
            self.entries, self.metadata = _read_header(self._handle())

    def read(self, name: str, index: Index | None = None) -> NDArray[Any]:
        """One tensor, or its slice at `index`, in its stored type."""
        entry = self.entries[name]
        shape, dtype = entry.shape, FLOATS[entry.dtype]
        bounds = [
            s.indices(size) for s, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
        ]
        if any(step != 1 for *_, step in bounds):
            return self.read(name)[index]
        box = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
        found = np.empty([s.stop - s.start for s in box], dtype)
        if found.size:
            with _explained(self._path):
                _read_box(self._handle(), entry.offset, shape, box, found)
        return found

    def _handle(self) -> _Handle:
        """The file, opened if it is not open. Whoever has it can read on when others push it out."""
        with _OPENING:
            handle = _OPEN.pop(self, None)
            if handle is None:
                handle = _Handle(os.open(self._path, os.O_RDONLY))
                stat = os.fstat(handle.descriptor)
                stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._stamp not in (None, stamp):
                    raise _Damaged("it has changed since it was first opened")
                self._stamp = stamp
            _OPEN[self] = handle
            while len(_OPEN) > _MOST_OPEN:
                del _OPEN[next(iter(_OPEN))]
            return handle


# The files that are open, that of the latest use last.
_OPEN: weakref.WeakKeyDictionary[TensorFile, _Handle] = weakref.WeakKeyDictionary()
_OPENING = threading.Lock()


class _Damaged(Exception):
    """A file is not what it should be; the text says in what way."""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise WeightsError(f"{path}: missing; the directory is incomplete") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except _Damaged as error:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise WeightsError(
                    f"{path}: only a Git LFS pointer; run `git lfs pull` in its directory"
                ) from None
        raise WeightsError(f"{path}: damaged or cut short ({error}); copy or download it again") from None


def _read_header(handle: _Handle) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file. Raises _Damaged unless they fill it exactly, as safetensors requires."""
    size = os.fstat(handle.descriptor).st_size
    length = int.from_bytes(os.pread(handle.descriptor, 8, 0), "little")
    if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
        raise _Damaged(f"{size} bytes, without a whole header")
    try:
        tree = json.loads(os.pread(handle.descriptor, length, 8))
        metadata = {str(key): str(value) for key, value in (tree.pop("__metadata__", None) or {}).items()}
        found = []
        for name, entry in tree.items():
            begin, end = map(int, entry["data_offsets"])
            found.append((begin, end, name, str(entry["dtype"]), tuple(map(int, entry["shape"]))))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _Damaged("its header cannot be read") from None
    entries, at = {}, 0
    for begin, end, name, dtype, shape in sorted(found):
        size_of = math.prod(shape) * FLOATS[dtype].itemsize if dtype in FLOATS else end - begin
        if begin != at or end - begin != size_of or size_of < 0 or min(shape, default=0) < 0:
            raise _Damaged(f"its header has no place for {name}")
        entries[name], at = Entry(dtype, shape, 8 + length + begin), end
    if 8 + length + at != size:
        raise _Damaged(f"{size} bytes instead of {8 + length + at}")
    return entries, metadata


def _read_box(handle: _Handle, offset: int, shape: tuple[int, ...], box: Index, into: NDArray[Any]) -> None:
    """Read the box of a tensor that lies at `offset` in row-major order."""
    if all(s.stop - s.start == size for s, size in zip(box[1:], shape[1:], strict=True)):
        first = box[0].start * math.prod(shape[1:]) * into.itemsize if box else 0
        return _read_bytes(handle, offset + first, into)
    rows, inner = box[0], math.prod(shape[1:])
    row_bytes = inner * into.itemsize
    wanted = math.prod(s.stop - s.start for s in box[1:])
    if row_bytes > _BLOCK_BYTES and 2 * wanted < inner:
        for i, row in enumerate(range(rows.start, rows.stop)):
            _read_box(handle, offset + row * row_bytes, shape[1:], box[1:], into[i, ...])
        return None
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(rows.start, rows.stop, step):
        end = min(row + step, rows.stop)
        block = np.empty((end - row, *shape[1:]), into.dtype)
        _read_bytes(handle, offset + row * row_bytes, block)
        into[row - rows.start : end - rows.start] = block[(slice(None), *box[1:])]
    return None


def _read_bytes(handle: _Handle, offset: int, into: NDArray[Any]) -> None:
    """Fill a contiguous array. Raises _Damaged where the file ends before."""
    whole = into.reshape(-1).view(np.uint8).data
    if THREADS == 1 or len(whole) < _ALONE_BYTES:
        _read_stretch(handle, offset, whole)
        return
    step = -(-len(whole) // THREADS)
    others = [
        _readers().submit(_read_stretch, handle, offset + at, whole[at : at + step])
        for at in range(step, len(whole), step)
    ]
    try:
        _read_stretch(handle, offset, whole[:step])
    finally:
        wait(others)  # they write into the array
    for other in others:
        other.result()


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read beside the one that asks, from the first array on that is long enough."""
    os.register_at_fork(after_in_child=_readers.cache_clear)  # a fork has none of them
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="read")


def _read_stretch(handle: _Handle, offset: int, rest: memoryview) -> None:
    while rest:
        count = os.preadv(handle.descriptor, [rest], offset)
        if not count:
            raise _Damaged("it ends before its data")
        rest, offset = rest[count:], offset + count


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
