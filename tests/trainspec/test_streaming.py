"""A whole model is made of shards with a few tensors in memory: the peak is measured, as allocations and as the process's own."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded import save_sharded
from small import QA, ROOT, SMALL, write_tokenizer

from trainspec import weight as weights_module
from trainspec.checkpoints.export import consolidate
from trainspec.files import digests, tensors
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of, read_model_spec
from trainspec.methods import trainable_table
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.recipe import Recipe
from trainspec.weight import Weight, blocks, computed, stacked

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "targets": "all-linear"},
    "dora": {"kind": "dora", "rank": 4, "targets": "all-linear"},
}


def spec_of(width: int) -> ModelSpec:
    """The three matrices of an MLP are the largest tensors; all together are more than twenty times as large."""
    return replace(
        SMALL, name="m", embed=width, mlp=4 * width, layers=5, heads=4, kv_heads=4, head_dim=width // 4
    )


def trained(home: Path, width: int, method: str) -> tuple[Path, Recipe, int]:
    """A model's directory, a checkpoint of two processes beside it; its recipe; the bytes of the largest tensor."""
    spec, draws = spec_of(width), np.random.default_rng(0)
    home.mkdir(parents=True)
    config = config_of(spec) | {"dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    arrays = {p.name: draws.standard_normal(p.shape, np.float32) for p in param_table(spec)}
    largest, total = (take(a.nbytes for a in arrays.values()) for take in (max, sum))
    assert total >= 20 * largest or width < 256
    write_model(home / "m", arrays.items(), companions_from=None, config=config)
    write_tokenizer(home / "m")
    recipe = Recipe.model_validate(
        {"model": {"from": str(home / "m")}, "data": {"train": str(QA)}, "method": METHODS[method]}
    )
    table = trainable_table(read_model_spec(home / "m"), recipe.method)
    state = {p.name: draws.standard_normal(p.shape, np.float32) for p in table}
    kinds = {kind: state for kind in ("weights", "moment1", "moment2")}
    return save_sharded(home / "run", kinds, recipe=recipe, step=1), recipe, largest


@pytest.mark.parametrize(
    "method",
    ["full", pytest.param("lora", marks=pytest.mark.full), pytest.param("dora", marks=pytest.mark.full)],
)
def test_a_few_tensors_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    path, recipe, largest = trained(tmp_path / "a", 256, method)
    monkeypatch.setattr(weights_module, "BLOCK_ELEMENTS", 2**15)
    for module in (tensors, digests):  # each has its buffer
        monkeypatch.setattr(module, "THREADS", 2)

    def peak(target: str) -> int:
        tracemalloc.start()
        consolidate(path, recipe, tmp_path / target, merge=method != "full", shard_bytes=8 * largest)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak("first")  # what is loaded once
    assert peak("out") < 4 * largest
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 3
    # Control: what keeps all tensors is seen.
    monkeypatch.setattr("trainspec.files.hf._finite", lambda name, weight, where: weight[...])
    assert peak("control") > 6 * largest


# Prints by how much the process grows at most. Writing 5 to clear_refs begins the highest mark anew (man 5 proc).
GROWTH = """
import sys
from pathlib import Path
from trainspec.cli import main
def words(home):
    return ["checkpoint", "consolidate", f"{home}/run", "--out", f"{home}/out", *sys.argv[3:]]
def status(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])
assert main(words(sys.argv[1])) == 0  # loads everything
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
assert main(words(sys.argv[2])) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_process_stays_small(tmp_path: Path, method: str):
    trained(tmp_path / "small", 64, method)
    *_, largest = trained(tmp_path / "large", 1024, method)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, tmp_path / "small", tmp_path / "large", *(["--merge"] if method != "full" else [])],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 4 * largest


def test_blocks_are_the_tensor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_module, "BLOCK_ELEMENTS", 10)
    for shape in ((), (3,), (25,), (7, 3), (2, 40), (3, 2, 4), (0, 4)):
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)
        seen = np.zeros(shape)
        for block in blocks(shape):
            seen[block] += 1
        assert (seen == 1).all()
        asked: list[int] = []

        def make(index: Any, array: np.ndarray = array, asked: list[int] = asked) -> np.ndarray:
            asked.append(array[index].size)
            return 2 * array[index]

        made = computed(shape, np.dtype(np.float32), make)
        assert np.array_equal(made[...], 2 * array)
        assert made[...].dtype == np.float32
        assert not shape or max(asked, default=0) <= max(10, array[:1].size)
    whole = np.arange(24.0).reshape(8, 3)
    parts = [whole[:2], Weight((5, 3), whole.dtype, lambda index: whole[2:7][index]), whole[7:]]
    for rows in (slice(None), slice(0, 2), slice(1, 3), slice(6, 8), slice(3, 4)):
        assert np.array_equal(stacked(parts)[rows, slice(1, 3)], whole[rows, 1:3])
