"""Digests of files in parts: what several threads make of a file is what its definition says, and every flip changes it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file
from writers import save

from trainspec.checkpoints import verify
from trainspec.checkpoints.manifest import FILE, read_manifest
from trainspec.cores import cores
from trainspec.errors import RecipeError, WeightsError
from trainspec.files import digests, tensors
from trainspec.files.digests import BLAKE3, PART_BYTES, SHA256, algorithm_of, digest_of
from trainspec.files.tensors import write_tensors
from trainspec.runs.processes import Processes

HASHES = {SHA256: hashlib.sha256, BLAKE3: blake3}
TAGS = {SHA256: "", BLAKE3: "blake3:"}


@pytest.fixture(params=HASHES)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each hash as that of new digests."""
    for module in (digests, tensors):
        monkeypatch.setattr(module, "ALGORITHM", request.param)
    return request.param


def found(path: Path, part_bytes: int | None = PART_BYTES) -> str:
    with path.open("rb") as file:
        return digest_of(file, part_bytes)


def defined(content: bytes, part_bytes: int, algorithm: str) -> str:
    """The definition, in one line."""
    parts = [content[at : at + part_bytes] for at in range(0, max(1, len(content)), part_bytes)]
    hashed = HASHES[algorithm]
    whole = b"".join(hashed(part).digest() for part in parts) if len(parts) > 1 else content
    return TAGS[algorithm] + hashed(whole).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 999, 1000])
def test_any_number_of_threads_finds_what_is_defined(
    tmp_path: Path, threads: int, size: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(digests, "THREADS", threads)
    monkeypatch.setattr(digests, "_PIECE_BYTES", 33)
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(content)
    assert found(tmp_path / "a", 100) == defined(content, 100, algorithm)
    assert found(tmp_path / "a", None) == hashlib.sha256(content).hexdigest()
    # That of a file of one part is what sha256sum and b3sum say; control: that of several is not.
    plain = TAGS[algorithm] + HASHES[algorithm](content).hexdigest()
    assert (found(tmp_path / "a", 100) == plain) == (size <= 100)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_is_written_has_the_digest_that_is_returned(
    tmp_path: Path, threads: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
):
    """Small tensors that are joined, and large ones that several parts have; parts are written in any order."""
    monkeypatch.setattr(tensors, "THREADS", threads)
    rng = np.random.default_rng(threads)
    sizes = [3, 1000, 5_000_000, 7, 20_000, 600_001, 1, 262_144]
    arrays: dict[str, np.ndarray] = {f"{i}": rng.random(size, np.float32) for i, size in enumerate(sizes)}
    arrays["wide"] = rng.random(70_000)
    path = tmp_path / "a.safetensors"
    digest = write_tensors(arrays, path, metadata={"step": "1"})
    content = path.read_bytes()
    assert len(content) > 5 * PART_BYTES
    assert digest == defined(content, PART_BYTES, algorithm) == found(path)
    read = load_file(path)
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


def test_a_flip_in_any_part_a_swap_of_parts_and_a_cut_change_the_digest(tmp_path: Path, algorithm: str):
    path, rng = tmp_path / "a", np.random.default_rng(0)
    content = rng.bytes(3 * PART_BYTES + 5)
    path.write_bytes(content)
    whole = found(path)
    for place in [0, PART_BYTES - 1, PART_BYTES, 2 * PART_BYTES + 7, len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert found(path) != whole, place
    first, second = content[:PART_BYTES], content[PART_BYTES : 2 * PART_BYTES]
    for other in (second + first + content[2 * PART_BYTES :], content[:-5], content + b"\0"):
        path.write_bytes(other)
        assert found(path) != whole
    path.write_bytes(content)
    assert found(path) == whole  # control


def test_a_checkpoint_whose_files_were_hashed_as_a_whole_is_verified_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As earlier versions wrote it: no part_bytes, and plain SHA-256s; here parts are small, so that they differ."""
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000001"
    manifest = read_manifest(path)
    assert manifest.part_bytes == PART_BYTES
    plain = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest.digests}
    parted = {name: defined((path / name).read_bytes(), 64, SHA256) for name in manifest.digests}
    for part_bytes, right, wrong in ((None, plain, parted), (64, parted, plain)):
        replace(manifest, part_bytes=part_bytes, digests=right).write(path)
        assert verify.damages(path) == []
        file = path / "moment1.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (line,) = verify.damages(path)
        assert "moment1.safetensors: damaged (its digest is not the recorded one" in line
        file.write_bytes(content)
        replace(manifest, part_bytes=part_bytes, digests=wrong).write(path)
        assert len(verify.damages(path)) == 3  # control: the two differ
    tree = json.loads((path / FILE).read_text())
    del tree["part_bytes"], tree["digest"], tree["sizes"], tree["digests"]
    (path / FILE).write_text(json.dumps(tree | {"sha256": plain}))
    assert verify.damages(path) == []


def test_each_file_says_what_made_its_digest(tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    """Of one checkpoint each may be another, as of processes of several installations."""
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000001"
    manifest = read_manifest(path)
    assert {algorithm_of(digest) for digest in manifest.digests.values()} == {algorithm}
    mixed = {
        name: defined((path / name).read_bytes(), PART_BYTES, each)
        for name, each in zip(manifest.digests, [SHA256, BLAKE3, algorithm], strict=True)
    }
    replace(manifest, digests=mixed).write(path)
    assert verify.damages(path) == []
    # Controls: the number of one hash under the name of the other, and a hash that nobody knows.
    other = {name: "blake3:" + digest.removeprefix("blake3:") for name, digest in mixed.items()}
    replace(manifest, digests=other).write(path)
    assert len(verify.damages(path)) == 1 + (algorithm == SHA256)
    replace(manifest, digests={name: "crc32:00" for name in mixed}).write(path)
    with pytest.raises(WeightsError, match=r"digests are of crc32, which this version does not know"):
        verify.newest_whole(tmp_path, Processes())
    assert path.is_dir()  # nothing was set aside


def test_without_its_package_blake3_is_refused_and_named_and_sha256_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert digests.ALGORITHM == BLAKE3  # as both backends are installed
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000001"
    monkeypatch.setitem(sys.modules, "blake3", None)
    monkeypatch.setattr(digests, "blake3", None)
    with pytest.raises(RecipeError) as refused:
        verify.damages(path)
    assert str(refused.value) == (
        f"{path}: its digests are of BLAKE3, which is not installed; pip install 'twintrain[digests]'"
    )
    assert path.is_dir()  # it is not damaged, and not set aside
    code = "import sys; sys.modules['blake3'] = None; from trainspec.files import digests; print(digests.ALGORITHM)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == SHA256


@pytest.mark.parametrize("length", [0, -1, "1048576", 1.5, True])
def test_a_part_that_has_no_length_is_a_damaged_manifest(tmp_path: Path, length: Any):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000001"
    replace(read_manifest(path), part_bytes=length).write(path)
    words = "checkpoint.json is damaged: a value in it is of another kind"
    assert verify.damages(path) == [f"{path}: incomplete checkpoint ({words})"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_a_process_that_is_bound_to_a_core_hashes_in_one_thread():
    """Others of the machine are not its own, as in Slurm's jobs."""
    bound = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    code = f"{bound}; from trainspec.files.digests import THREADS; assert THREADS == 1, THREADS"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cores() == len(os.sched_getaffinity(0))
