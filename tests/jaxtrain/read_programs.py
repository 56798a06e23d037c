"""What the compiled programs of some plans hold and move, as JSON.

python tests/jaxtrain/read_programs.py CASES.json OUT.json      CASES as for run_plans.py; of a case with "held_only"
no program's text is read, one with "saves_gathered" runs with `saving_matmul`.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from run_plans import recipe_of

import jaxtrain.layers
from jaxtrain import cluster, cost, step
from jaxtrain.weight_ops import BoundWeight
from trainspec.data import Batch
from trainspec.methods import full_table, trainable_table
from trainspec.plans.plan import local_size


def saving_matmul(x: Array, weight: BoundWeight) -> Array:
    """The negative control: what autodiff does by itself, it keeps the gathered weight for the backward pass."""
    return x @ lax.with_sharding_constraint(weight.value + weight.grad_placeholder, weight.sharding.in_use)


def by_the_table(state: Any, recipe: Any, spec: Any) -> dict[str, int]:
    """Elements per device of each kind of state."""
    tables = {"weights": full_table(spec, recipe.method)}
    tables |= dict.fromkeys(("gradients", "optimizer"), trainable_table(spec, recipe.method))
    return {
        kind: sum(local_size(p, recipe.plan, over_fsdp=recipe.plan.splits(kind)) for p in table)
        for kind, table in tables.items()
    }


def arrays_of_logits(text: str, spec: Any, recipe: Any) -> Iterator[str]:
    """Arrays in the program of one device as large as the logits of its examples over the whole vocabulary."""
    examples = recipe.batch.global_examples // recipe.batch.accumulation // recipe.plan.replicas
    tokens = examples * (recipe.data.sequence_tokens - 1)
    for dims in re.findall(r"\b(?:f64|f32|bf16)\[([\d,]+)\]", text):
        sizes = [int(size) for size in dims.split(",")]
        if spec.vocab in sizes and np.prod(sizes) >= tokens * spec.vocab:
            yield dims


def facts(recipe: Any, *, held_only: bool) -> dict[str, Any]:
    run = cluster.start(recipe)
    spec, state = run.spec, step.init_state(run)
    zeros = np.zeros((recipe.batch.global_examples, recipe.data.sequence_tokens), np.int32)
    batch = Batch(zeros, zeros, zeros, zeros, zeros[:, 0])
    sizes = {"held": cost.held(state, batch), "elements": by_the_table(state, recipe, spec)}
    if held_only:
        return sizes
    arguments = (state.trainable, state.frozen, state.program.feeder.slices(batch), jnp.int32(0))
    text = state.program.gradients.lower(*arguments, record_activations=False).compile().as_text()
    return sizes | {
        "logits": sorted(set(arrays_of_logits(text or "", spec, recipe))),
        "moved": [vars(c) for c in cost.moved(state, batch)],
        "types": {
            kind: str(next(iter(getattr(state, kind).values())).dtype)
            for kind in ("trainable", "master")
            if getattr(state, kind)
        },
    }


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    programs, matmul = {}, jaxtrain.layers.matmul
    for name, case in json.loads(cases.read_text()).items():
        sections = dict(case)
        jaxtrain.layers.matmul = saving_matmul if sections.pop("saves_gathered", False) else matmul
        held_only, variant = sections.pop("held_only", False), sections.pop("variant", "plain")
        programs[name] = facts(recipe_of(cases.parent, variant, sections), held_only=held_only)
    out.write_text(json.dumps(programs))


if __name__ == "__main__":
    main()
