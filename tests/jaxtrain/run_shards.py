"""What each process saves of states that are known to the last bit, and what a state is that was restored under other plans.

    python tests/jaxtrain/run_shards.py CASES.json OUT.json      CASES: {name: {"variant": ..., sections of a recipe ...}}

A case with "to" restores under each of these plans what it has saved under its own, one with "from" what another launch has saved
there; one with "omits" saves no shard of that tensor in the last process. OUT has for every case what was found.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from jax.experimental import multihost_utils
from run_plans import recipe_of

from jaxtrain import cluster, step
from trainspec.checkpoints import checkpoint, folders
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.portable import PortableFormat
from trainspec.checkpoints.shards import KINDS, Shard
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.plans.plan import STORED_DTYPE
from trainspec.rng import name_key
from trainspec.runs.run import Run

STEP = 3


def drawn(run: Run) -> Checkpoint:
    """Weights and moments in which no two elements are equal."""
    dtype = STORED_DTYPE[run.recipe.precision.policy]
    kinds = [
        {
            p.name: np.random.default_rng(name_key(i, kind, p.name)).random(p.shape).astype(dtype)
            for p in run.trained
        }
        for i, kind in enumerate(KINDS)
    ]
    return Checkpoint(STEP, *kinds)


def started(recipe: Any) -> step.State:
    """The run before its first update; several processes may not make more devices for a smaller plan."""
    return step.init_state(cluster.start(recipe))


def gathered_calls() -> Any:
    """Notes every call that sends an array between processes."""
    return patch.object(multihost_utils, "process_allgather", wraps=multihost_utils.process_allgather)


def examined(shards: list[Shard], expected: Checkpoint) -> dict[str, Any]:
    """Of this process's shards: the bytes, whether all have the expected elements, and how many elements are there how often."""
    times = {
        (kind, name): np.zeros(w.shape, int) for kind in KINDS for name, w in getattr(expected, kind).items()
    }
    is_equal = True
    for shard in shards:
        whole = getattr(expected, shard.kind)[shard.name]
        is_equal &= shard.shape == whole.shape and shard.array.dtype == whole.dtype
        is_equal &= np.array_equal(whole[shard.index], shard.array)
        times[shard.kind, shard.name][shard.index] += 1
    counts = np.concatenate([array.ravel() for array in times.values()])
    return {
        "equal": bool(is_equal),
        "bytes": sum(shard.array.nbytes for shard in shards),
        "once": int((counts == 1).sum()),
        "more": int((counts > 1).sum()),
        "elements": counts.size,
    }


def same(state: step.State, expected: Checkpoint) -> bool:
    """Whether a state has exactly these weights and moments, and in bf16 the weights to compute with that belong to them."""
    found = (step.weights_of(state), *step.moments_of(state))
    is_same = state.step == expected.step and all(
        mine.keys() == getattr(expected, kind).keys()
        and all(np.array_equal(array, getattr(expected, kind)[name]) for name, array in mine.items())
        for kind, mine in zip(KINDS, found, strict=True)
    )
    rounded = state.program.storage.computed(state.master) if state.master else {}
    return is_same and all(bool((state.trainable[n] == w).all()) for n, w in rounded.items())


def saved(state: step.State, out: Path, *, omits: str | None) -> str:
    """Save a state with all processes; the error's text, if there is one."""
    run, processes = state.program.run, cluster.processes()
    manifest = manifest_of(run.recipe, None, {p.name: p.shape for p in run.trained})
    store = CheckpointStore(
        out, PortableFormat(step, run, processes), manifest, run.recipe.checkpoint, processes
    )
    is_last, shards_of = processes.index == processes.count - 1, step.shards_of
    kept = (lambda state: (s for s in shards_of(state) if s.name != omits)) if is_last else shards_of
    error = ""
    with patch.object(step, "shards_of", kept):
        store.save(state)
        try:
            store.wait()
        except Exception as raised:
            error = str(raised)
    processes.exchange("saved")
    return error


def examine(case: dict[str, Any], scratch: Path, out: Path) -> dict[str, Any]:
    sections = dict(case)
    variant, targets = sections.pop("variant", "plain"), sections.pop("to", {})
    omits, source = sections.pop("omits", None), sections.pop("from", None)
    recipe = recipe_of(scratch, variant, sections)
    state = started(recipe)
    run = state.program.run
    expected = drawn(run)
    state = step.restore(state, checkpoint.load(folders.latest(Path(source)), run) if source else expected)
    if source:
        return {"same": same(state, expected)}
    with gathered_calls() as calls:
        shards = list(step.shards_of(state))
    found = examined(shards, expected) | {"gathered": calls.call_count}
    if not targets and omits is None:
        return found
    found["error"] = saved(state, out, omits=omits)
    newest = folders.latest(out)
    found["files"] = sorted(read_manifest(newest).sha256) if newest else []
    found["left"] = sorted(p.name for p in folders.checkpoints_of(out).iterdir())
    for name, plan in targets.items():
        again = recipe_of(scratch, variant, sections | {"plan": plan})
        state = started(again)
        state = step.restore(state, checkpoint.load(newest, state.program.run))
        found[name] = same(state, expected)
    if targets:
        last = next(iter(expected.moment2.values()))
        last.flat[-1] = np.nextafter(last.flat[-1], last.dtype.type(2))
        found["another"] = same(state, expected)
    return found


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        # All processes save into one directory.
        models = cases.parent / f"models-{os.environ.get('JAX_PROCESS_ID', '0')}"
        found[name] = examine(case, models, cases.parent / "saved" / name)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
