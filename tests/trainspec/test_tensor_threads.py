"""Tensors that several threads read, and matrices that are copied tile by tile: every element is where it was."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainspec.errors import WeightsError
from trainspec.files import tensors
from trainspec.files.tensors import TensorFile, copy_into, row_major, write_tensors

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_large_tensors_and_slices_of_rows_are_read_whole(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "THREADS", threads)
    tensors._readers.cache_clear()
    array = RNG.normal(size=(1037, 311)).astype(np.float32)
    save_file({"a": array, "small": array[:3]}, tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    np.testing.assert_array_equal(file.read("a"), array)
    np.testing.assert_array_equal(file.read("a", (slice(5, 999), slice(0, 311))), array[5:999])
    np.testing.assert_array_equal(file.read("small"), array[:3])
    tensors._readers.cache_clear()


def test_a_file_that_is_cut_while_it_is_read_is_named_whichever_thread_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    array, preadv = RNG.normal(size=(1037, 311)), os.preadv
    save_file({"a": array}, tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    half = array.nbytes // 2
    for is_lost in (lambda offset: offset >= half, lambda offset: offset < half):
        read = lambda fd, into, at, lost=is_lost: 0 if lost(at) else preadv(fd, into, at)  # noqa: E731
        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(WeightsError, match="it ends before its data"):
            file.read("a")
    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(file.read("a"), array)  # control


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 and later
def test_a_fork_reads_with_threads_of_its_own(tmp_path: Path):
    array = RNG.normal(size=(1037, 311))
    save_file({"a": array}, tmp_path / "a")
    assert TensorFile(tmp_path / "a").read("a").sum() == array.sum()
    child = os.fork()
    if not child:
        is_same = False
        try:
            is_same = np.array_equal(TensorFile(tmp_path / "a").read("a"), array)
        finally:
            os._exit(0 if is_same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (200, 7), (3, 300)])
def test_tiles_are_what_numpy_copies(shape: tuple[int, int], dtype: type, tmp_path: Path):
    array = RNG.normal(size=shape).astype(dtype)
    found = row_major(array.T)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array.T)
    into = np.zeros(shape, dtype)
    copy_into(into, np.ascontiguousarray(array.T).T)
    np.testing.assert_array_equal(into, array)
    wide = np.zeros(shape)
    copy_into(wide, np.ascontiguousarray(array.T).T)
    np.testing.assert_array_equal(wide, array.astype(np.float64))
    assert row_major(array) is array
    write_tensors({"a": array.T}, tmp_path / "a")
    if dtype is not ml_dtypes.bfloat16:  # which safetensors does not give to numpy
        np.testing.assert_array_equal(load_file(tmp_path / "a")["a"], array.T)
    np.testing.assert_array_equal(TensorFile(tmp_path / "a").read("a"), array.T)
