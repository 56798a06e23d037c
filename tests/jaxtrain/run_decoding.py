"""Logits of a cache and of whole rows under many plans, in a process of fake devices or in one of several processes.

    python tests/jaxtrain/run_decoding.py CASES.json OUT.npz      CASES: {name: {"variant": ..., sections of a recipe ...}}

A case with "stacked" has its layers in a scan, as where the devices are no CPU; one with "late" rotates each token one position
late; of one with "factors" the program of a token is read. OUT has `NAME/cached` and `NAME/whole` [steps, B, vocab], `NAME/shard`,
the shape of a device's keys, and `NAME/compiled` [3, 1 + steps]: how many programs were compiled when a batch began and with each token
after it, of a first batch, a second one of its shape, and one of another shape. `NAME/products` [N, 2] are the shapes of what the products of two matrices in a program make.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from run_plans import recipe_of

from jaxtrain import cluster, step
from jaxtrain.decoding import Cache, CachedPrograms, CachedRows
from trainspec.generation.decoding import WholeRows
from trainspec.generation.rows import batch_of

ROWS = [[1, 7, 9, 30, 4], [1, 5], [1, 300, 12, *range(40, 60)], [1]]
ADDED = [[11, 12, 13, 14], [21, -1, 23, 24], [31, -1, 33, 34]]
compiled = 0


def count(event: str, _: float, **__: Any) -> None:
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


def products(programs: CachedPrograms, decoding: CachedRows) -> list[tuple[int, ...]]:
    ids = decoding._feeder.replicated(np.array(ADDED[0], np.int32))
    text = programs.extend.lower(decoding._weights_of_step, decoding._cache, ids).compile().as_text()
    return [(int(a), int(b)) for a, b in re.findall(r"= f\d\d\[(\d+),(\d+)\]\S* dot\(", text)]


def run(recipe: Any, *, is_stacked: bool, is_late: bool, is_read: bool) -> dict[str, Any]:
    state = step.init_state(cluster.start(recipe))
    programs = state.program.cached
    assert programs is not None
    programs.is_apart = programs.is_apart and not is_stacked
    found: dict[str, Any] = {"compiled": []}
    for length in (70, 70, 90):
        counts = [compiled]
        decoding = step.decoding(state, length=length)
        batch, last = batch_of(ROWS, limit=length, count=4)
        logits = [decoding.begin(batch, last)]
        counts.append(compiled)
        for ids in np.array(ADDED, np.int32):
            if is_late:
                cache = decoding._cache
                decoding._cache = Cache(cache.kept, cache.tokens_B + 1)
            logits.append(decoding.extend(ids))
            counts.append(compiled)
        found["compiled"].append(np.diff(counts))
    if is_read:
        found["products"] = products(programs, decoding)
    kept = decoding._cache.kept
    found["shard"] = jax.tree.leaves(kept)[0].addressable_shards[0].data.shape
    whole = WholeRows(step, state, limit=70)
    found["cached"], found["whole"] = logits, [whole.begin(batch, last)]
    for ids in np.array(ADDED, np.int32):
        found["whole"].append(whole.extend(ids))
    return found


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    jax.monitoring.register_event_duration_secs_listener(count)
    arrays = {}
    for name, case in json.loads(cases.read_text()).items():
        sections = dict(case)
        stacked, late, read = (sections.pop(key, False) for key in ("stacked", "late", "factors"))
        recipe = recipe_of(cases.parent, sections.pop("variant", "plain"), sections)
        for key, value in run(recipe, is_stacked=stacked, is_late=late, is_read=read).items():
            array = np.asarray(value)
            arrays[f"{name}/{key}"] = array if array.dtype.kind in "fi" else array.astype(np.float32)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
