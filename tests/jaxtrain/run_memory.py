"""The host memory that a save and a load take in each process, beside the share of the state that the process holds.

    python tests/jaxtrain/run_memory.py CASES.json OUT.json      CASES: {name: {sections of a recipe ...}}

OUT has for every case, in bytes: `share`, `tensor` (the largest of the model), `save`, `again` (the next save) and `load` (what the process grew by at most); and in seconds `blocked` and `saved`, how
long a save kept the main thread and how long it took in all.
"""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from small import SMALL, recipe_maker, write_checkpoint

from jaxtrain import cluster, step
from trainspec.checkpoints import folders
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.store import CheckpointStore, manifest_of

# 25 M parameters, 300 MB with both moments in float32: what is around them is small beside that.
SPEC = replace(SMALL, name="memory", embed=512, heads=8, kv_heads=8, head_dim=64, mlp=1536, layers=8)
_SAMPLE_SECONDS = 0.001


def resident_bytes() -> int:
    """Memory of this process that no file backs: pages of mapped weight files are the system's to take back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux says it")


@contextmanager
def growth(found: dict[str, Any], name: str) -> Iterator[None]:
    """By how much the process grew meanwhile, at most."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed earlier would be taken first, and not be seen
    before, is_done = resident_bytes(), threading.Event()
    highest = [before]

    def watch() -> None:
        while not is_done.wait(_SAMPLE_SECONDS):
            highest.append(resident_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        is_done.set()
        watching.join()
        found[name] = max(highest) - before


def measured(recipe: Any, out: Path) -> dict[str, Any]:
    run = cluster.start(recipe)
    processes, state = cluster.processes(), step.init_state(run)
    formats = Formats(step, run, processes)
    manifest = replace(manifest_of(recipe, None, {p.name: p.shape for p in run.trained}), backend="jax")
    store = CheckpointStore(out, formats, manifest, recipe.checkpoint, processes)
    held = [
        shard.data.nbytes
        for kind in step.arrays_of(state).values()
        for a in kind.values()
        for shard in a.addressable_shards
    ]
    jax.block_until_ready(step.arrays_of(state))
    found: dict[str, Any] = {"share": sum(held), "tensor": max(4 * p.size for p in run.trained)}
    with growth(found, "save"):
        store.save(state)
        store.wait()
    processes.exchange("saved")
    # The time is that of the second: the first compiles, and asks the system for its memory.
    with growth(found, "again"):
        began = time.monotonic()
        store.save(replace(state, step=1))
        found["blocked"] = time.monotonic() - began
        store.wait()
        found["saved"] = time.monotonic() - began
    processes.exchange("saved again")
    for arrays in step.arrays_of(state).values():
        for array in arrays.values():
            array.delete()
    with growth(found, "load"):
        jax.block_until_ready(step.arrays_of(formats.restore(state, folders.latest(out))))
    return found


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    found, model = {}, cases.parent / f"model-{os.environ.get('JAX_PROCESS_ID', '0')}"
    make = recipe_maker({"memory": write_checkpoint(model, SPEC)})
    for name, case in json.loads(cases.read_text()).items():
        found[name] = measured(make("memory", **case), cases.parent / "saved" / name)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
