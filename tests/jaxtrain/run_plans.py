"""Train one recipe under many plans in one process of eight fake devices, or in one of several processes.

    python tests/jaxtrain/run_plans.py CASES.json OUT.npz      CASES: {name: {"variant": ..., sections of a recipe ...}}

A case with "unrolled" has its layers one after the other, as wide models have them on a CPU; `NAME/unrolled` counts the programs that do.
A case with "keep" keeps that of its metrics in place of "activations". One with "first_plan" makes its first update under that plan, and resumes from the checkpoint under its own.

OUT has `NAME/KIND/STEP/TENSOR` for losses, norms, gradients, updates and activations, and what was read of the start.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from jax import lax
from small import VARIANTS, recipe_maker, write_checkpoint

from jaxtrain import cluster, step
from jaxtrain.decoder import UNROLLED_WIDTH
from trainspec.checkpoints import folders
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.data import open_dataset
from trainspec.evaluation.loss import heldout_examples, heldout_loss
from trainspec.runs.run import resolve
from trainspec.weight import Weight

STEPS = 2


def recipe_of(scratch: Path, variant: str, sections: dict[str, Any]) -> Any:
    """A small recipe; four kv heads, so that tensor can be 4. `deep` has weights that outweigh its activations."""
    variants = {name: replace(spec, kv_heads=4) for name, spec in VARIANTS.items()}
    for layers in (2, 6):
        sizes = {"embed": 256, "mlp": 512, "heads": 8, "kv_heads": 8, "head_dim": 32, "layers": layers}
        variants[f"wide-{layers}"] = replace(VARIANTS["plain"], **sizes)
    variants |= {
        f"{name}-{layers}": replace(VARIANTS[name], kv_heads=4, layers=layers)
        for name in VARIANTS
        for layers in (4, 5, 9)
    }
    directory = scratch / f"model-{variant}"
    if not directory.exists():
        write_checkpoint(directory, variants[variant])
    return recipe_maker({variant: directory})(variant, **sections)


def run(recipe: Any, first: Any, out: Path, keep: Any) -> dict[str, Any]:
    """`STEPS` updates from the start, the first one of the recipe `first`, and the held-out loss."""
    reading = Reading()
    state = started(first)
    found: dict[str, Any] = {"read": reading.elements()}
    dataset = open_dataset(resolve(recipe), "train")
    for i in range(STEPS):
        if i == 1 and first != recipe:
            state = resumed(state, first, recipe, out)
        before = step.weights_of(state)
        batch = dataset.batch(i, recipe.batch.global_examples)
        state, metrics = step.train_step(state, batch, lr=1e-3, keep=keep)
        found |= {f"loss/{i}/loss": metrics.loss_sum / metrics.tokens, f"norm/{i}/norm": metrics.grad_norm}
        updates = {name: after - before[name] for name, after in step.weights_of(state).items()}
        for kind, arrays in {
            "gradient": metrics.gradients,
            "update": updates,
            "activation": metrics.activations or {},
            "activation_gradient": metrics.activation_gradients or {},
            "moment2": step.moments_of(state)[1],
        }.items():
            found |= {f"{kind}/{i}/{name}": array for name, array in arrays.items()}
    found["logits/0/logits"] = step.logits(state, dataset.batch(STEPS, 8))
    run = resolve(recipe)
    heldout = open_dataset(run, "heldout")
    return found | {"evaluation/0/loss": heldout_loss(step, state, heldout, heldout_examples(run))}


def started(recipe: Any) -> step.State:
    return step.init_state(cluster.start(recipe))


def resumed(state: step.State, first: Any, recipe: Any, out: Path) -> step.State:
    """The state of `first`, saved and resumed under `recipe`, by all processes as in a run."""
    run, processes = state.program.run, cluster.processes()
    manifest = replace(manifest_of(first, None, {p.name: p.shape for p in run.trained}), backend="jax")
    store = CheckpointStore(out, Formats(step, run, processes), manifest, first.checkpoint, processes)
    store.save(state)
    store.wait()
    processes.exchange("saved")
    state = started(recipe)
    return Formats(step, state.program.run, processes).restore(state, folders.latest(out))


class Reading:
    """Counts the elements of the starting weights that this process takes."""

    def __init__(self) -> None:
        self.count, take = 0, Weight.__getitem__

        def counted(weight: Weight, index: Any) -> Any:
            array = take(weight, index)
            self.count += array.size
            return array

        self._take, Weight.__getitem__ = take, counted  # type: ignore[method-assign]

    def elements(self) -> int:
        """How many there were; ends the counting."""
        Weight.__getitem__ = self._take  # type: ignore[method-assign]
        return self.count


def counted(scan: Any, unrolls: list[bool]) -> Any:
    """`lax.scan`, which notes each call that leaves no loop."""

    def called(*arguments: Any, **settings: Any) -> Any:
        unrolls.extend([True] * (settings.get("unroll") is True))
        return scan(*arguments, **settings)

    return called


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    arrays, unrolls = {}, []
    lax.scan = counted(lax.scan, unrolls)
    for name, case in json.loads(cases.read_text()).items():
        sections = dict(case)
        first_plan, variant = sections.pop("first_plan", None), sections.pop("variant", "plain")
        keep, unrolled = sections.pop("keep", "activations"), sections.pop("unrolled", False)
        recipe = recipe_of(cases.parent, variant, sections)
        first = recipe_of(cases.parent, variant, sections | {"plan": first_plan}) if first_plan else recipe
        with patch("jaxtrain.decoder.UNROLLED_WIDTH", 0 if unrolled else UNROLLED_WIDTH):
            before, found = len(unrolls), run(recipe, first, cases.parent / "runs" / name, keep)
        for key, value in (found | {"unrolled": len(unrolls) - before}).items():
            wide = np.asarray(value)
            arrays[f"{name}/{key}"] = wide if wide.dtype.kind in "fi" else wide.astype(np.float32)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
