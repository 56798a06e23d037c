"""Train one recipe under many plans in one process of eight fake devices, or its part of several processes.

    python tests/jaxtrain/run_plans.py CASES.json OUT.npz      CASES: {name: {"variant": ..., sections of a recipe ...}}

OUT has `NAME/KIND/STEP/TENSOR` for losses, norms, gradients, updates and activations, and what was read of the start.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from small import VARIANTS, recipe_maker, write_checkpoint

from jaxtrain import parallel, step
from trainspec.data import open_dataset
from trainspec.hf import resolve_model
from trainspec.weight import Weight

STEPS = 2


def recipe_of(scratch: Path, variant: str, sections: dict[str, Any]) -> Any:
    """A small recipe; four kv heads, so that tensor can be 4. `deep` has weights that outweigh its activations."""
    variants = {name: replace(spec, kv_heads=4) for name, spec in VARIANTS.items()}
    for layers in (2, 6):
        sizes = {"embed": 256, "mlp": 512, "heads": 8, "kv_heads": 8, "head_dim": 32, "layers": layers}
        variants[f"wide-{layers}"] = replace(VARIANTS["plain"], **sizes)
    directory = scratch / f"model-{variant}"
    if not directory.exists():
        write_checkpoint(directory, variants[variant])
    return recipe_maker({variant: directory}, scratch / "cache")(variant, **sections)


def run(recipe: Any) -> dict[str, Any]:
    """`STEPS` updates from the start, and an evaluation."""
    parallel.start(recipe)
    reading = Reading()
    state = step.init_state(recipe, resolve_model(recipe.model)[0])
    found: dict[str, Any] = {"read": reading.elements()}
    dataset = open_dataset(recipe, "train")
    for i in range(STEPS):
        before = step.weights_of(state)
        batch = dataset.batch(i, recipe.batch.global_examples)
        state, metrics = step.train_step(state, batch, lr=1e-3, keep="activations")
        found |= {f"loss/{i}/loss": metrics.loss_sum / metrics.tokens, f"norm/{i}/norm": metrics.grad_norm}
        updates = {name: after - before[name] for name, after in step.weights_of(state).items()}
        for kind, arrays in {
            "gradient": metrics.gradients,
            "update": updates,
            "activation": metrics.activations,
            "activation_gradient": metrics.activation_gradients,
            "moment2": step.moments_of(state)[1],
        }.items():
            found |= {f"{kind}/{i}/{name}": array for name, array in arrays.items()}
    loss_sum, tokens = step.eval_step(state, dataset.batch(9, recipe.batch.global_examples))
    return found | {"evaluation/0/loss": loss_sum / tokens}


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


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    arrays = {}
    for name, case in json.loads(cases.read_text()).items():
        sections = dict(case)
        recipe = recipe_of(cases.parent, sections.pop("variant", "plain"), sections)
        for key, value in run(recipe).items():
            wide = np.asarray(value)
            arrays[f"{name}/{key}"] = wide if wide.dtype.kind in "fi" else wide.astype(np.float32)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
