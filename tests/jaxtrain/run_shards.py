"""What each process saves of states that are known to the last bit, and what a state is that was restored under other plans.

    python tests/jaxtrain/run_shards.py CASES.json OUT.json      CASES: {name: {"variant": ..., sections of a recipe ...}}

A case with "to" restores under each of these plans what it has saved under its own, one with "from" what another launch has saved
there, one with "converted" what is left of it after `convert` there and back; one with "updates" makes that many while it is saved;
one with "omits" saves no shard of that tensor in the last process, one with "spoiled" has a NaN in its first moment. OUT has for every case what was found.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray
from run_plans import recipe_of

from jaxtrain import cluster, native, step
from trainspec.checkpoints import folders
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.shards import KINDS, Shard
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.data import open_dataset
from trainspec.errors import UserError
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


def saved(state: step.State, out: Path, *, omits: str | None, updates: int) -> str:
    """Save a state with all processes while `updates` are made, which consume it; the error's text, if there is one."""
    run, processes = state.program.run, cluster.processes()
    manifest = replace(manifest_of(run.recipe, None, {p.name: p.shape for p in run.trained}), backend="jax")
    formats = Formats(step, run, processes)
    store = CheckpointStore(out, formats, manifest, run.recipe.checkpoint, processes)
    is_last, shards_of = processes.index == processes.count - 1, step.shards_of
    kept = (
        (lambda state, copy: (s for s in shards_of(state, copy) if s.name != omits)) if is_last else shards_of
    )
    batches = [open_dataset(run, "train").batch(i, run.recipe.batch.global_examples) for i in range(updates)]
    error = ""
    with patch.object(step, "shards_of", kept):
        try:
            store.save(state)
            for batch in batches:
                state, _ = step.train_step(state, batch, lr=0.1)
            store.wait()
        except Exception as raised:
            error = str(raised)
    processes.exchange("saved")
    return error


def restored(recipe: Any, path: Path) -> step.State:
    """A new state of `recipe` with what was saved at `path`."""
    state = started(recipe)
    return Formats(step, state.program.run, cluster.processes()).restore(state, path)


def restored_or_refused(recipe: Any, path: Path, expected: Checkpoint) -> bool | str:
    """Whether it is the expected state, or why there is none."""
    try:
        return same(restored(recipe, path), expected)
    except UserError as error:
        return str(error)


def examine(case: dict[str, Any], scratch: Path, out: Path) -> dict[str, Any]:
    sections = dict(case)
    variant, targets = sections.pop("variant", "plain"), sections.pop("to", {})
    omits, source = sections.pop("omits", None), sections.pop("from", None)
    spoiled = sections.pop("spoiled", None)
    updates, converted = sections.pop("updates", 0), sections.pop("converted", False)
    recipe = recipe_of(scratch, variant, sections)
    if source:
        run = cluster.start(recipe)
        return {"same": restored_or_refused(recipe, folders.latest(Path(source)), drawn(run))}
    state = started(recipe)
    expected = drawn(state.program.run)
    if spoiled:
        expected.moment1[spoiled].flat[-1] = np.nan
    state = step.restore(state, expected)
    sizes: list[int] = []

    def copy(array: NDArray[Any]) -> NDArray[Any]:
        sizes.append(array.nbytes)
        return array.copy()

    with gathered_calls() as calls:
        shards = list(step.shards_of(state, copy))
    found = examined(shards, expected) | {"gathered": calls.call_count}
    found["sizes known"] = step.copied_bytes(state) == sizes
    if not targets and omits is None and spoiled is None:
        return found
    found["error"] = saved(state, out, omits=omits, updates=updates)
    newest = folders.latest(out)
    found["files"] = sorted(read_manifest(newest).digests) if newest else []
    found["left"] = sorted(p.name for p in folders.checkpoints_of(out).iterdir())
    for name, plan in targets.items():
        found[name] = restored_or_refused(
            recipe_of(scratch, variant, sections | {"plan": plan}), newest, expected
        )
    if converted and newest:
        found["converted"] = []
        for name in ("there", "back"):
            format_, newest = native.convert(newest, out / name), out / name
            found["converted"].append((format_, restored_or_refused(recipe, newest, expected)))
    if targets:
        last = next(iter(expected.moment2.values()))
        last.flat[-1] = np.nextafter(last.flat[-1], last.dtype.type(2))
        found["another"] = restored_or_refused(recipe, newest, expected)
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
