"""How far a save and a load raise the memory of each process, in processes of a launcher; see test_torch_shards.py.

CASES is a list of {"recipe", "out", "gathers"}: with `gathers` each process's shards are those of a leader that has gathered
everything. The leader writes of each case, for all processes: bytes of the state that the process saves, and by how many bytes
`save`, another save (`again`) and `load` raise what it has in memory at most.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from probing import probe_all  # noqa: E402

from torchtrain import cluster, step  # noqa: E402
from trainspec.checkpoints import folders  # noqa: E402
from trainspec.checkpoints.copies import Copy  # noqa: E402
from trainspec.checkpoints.portable import PortableFormat  # noqa: E402
from trainspec.checkpoints.shards import Shard, as_shards  # noqa: E402
from trainspec.checkpoints.store import CheckpointStore, manifest_of  # noqa: E402
from trainspec.recipe import load_recipe  # noqa: E402


def raised_by(action: Callable[[], object]) -> int:
    """By how many bytes the process's memory grows at most while it runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is in memory now
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def gathered(state: step.State, copy: Copy) -> Iterator[Shard]:
    weights, (moment1, moment2) = step.weights_of(state), step.moments_of(state)
    for kind, arrays in (("weights", weights), ("moment1", moment1), ("moment2", moment2)):
        yield from as_shards(kind, arrays)


def probe(case: dict[str, Any]) -> dict[str, list[int]]:
    recipe = load_recipe(Path(case["recipe"]))
    run = cluster.start(recipe)
    processes, state = cluster.processes(), step.init_state(run)
    manifest = manifest_of(recipe, None, {p.name: p.shape for p in run.trained})
    portable = PortableFormat(step, run, processes)
    store = CheckpointStore(Path(case["out"]), portable, manifest, recipe.checkpoint, processes)
    share = sum(shard.array.nbytes for shard in step.shards_of(state))

    def save(updates: int = 0) -> None:
        store.save(replace(state, step=updates))
        store.wait()

    def load() -> None:
        path = folders.latest(Path(case["out"]))
        assert path is not None
        store.load(state, path)

    with patch.object(step, "shards_of", gathered) if case["gathers"] else nullcontext():
        saving = raised_by(save)
        processes.exchange("written")  # by the leader, after the others' files
        again = raised_by(lambda: save(1))
    processes.exchange("written again")
    mine = {"share": share, "save": saving, "again": again, "load": raised_by(load)}
    said = [json.loads(text) for text in processes.exchange(json.dumps(mine))]
    cluster.finish()
    return {key: [each[key] for each in said] for key in mine}


if __name__ == "__main__":
    probe_all(probe)
