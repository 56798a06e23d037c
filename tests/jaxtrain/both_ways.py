"""Two updates with one program and with two, under some plans, and what each way sends to other devices, as JSON.

python tests/jaxtrain/both_ways.py CASES.json OUT.json      CASES as for run_plans.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from run_plans import recipe_of

from jaxtrain import cluster, cost, step
from jaxtrain.optim import rates
from trainspec.data import open_dataset


def differing(recipe: Any) -> dict[str, Any]:
    """Names of the arrays that are not the same bit by bit, of how many; bytes sent by one program and by two."""
    run = cluster.start(recipe)
    dataset, states, like = open_dataset(run, "train"), [], None
    batches = [dataset.batch(i, recipe.batch.global_examples) for i in range(2)]
    for keep in ("nothing", "gradients"):
        state = like = step.init_state(run, like=like)
        figures = []
        for i, batch in enumerate(batches, 1):
            state, metrics = step.train_step(state, batch, lr=1e-3 * i, keep=keep)
            figures += [metrics.loss_sum, metrics.grad_norm]
        moments = zip(("moment1", "moment2"), step.moments_of(state), strict=True)
        arrays = {f"{moment}/{name}": array for moment, named in moments for name, array in named.items()}
        states.append(arrays | step.weights_of(state) | {"figures": np.array(figures)})
    one, two = states
    state, program = step.init_state(run, like=like), like.program
    lowered = program.train.lower(
        state.trainable, state.frozen, state.master, state.moments, program.feeder.slices(batches[0]), jnp.int32(0),
        rates(recipe.optimizer, lr=1e-3, step=0),
    )  # fmt: skip
    sent = cost._collectives(cost._partitioned(lowered), program="train")
    return {
        "arrays": len(one),
        "differing": [name for name, array in one.items() if not np.array_equal(array, two[name])],
        "sent": [sum(c.sent_bytes for c in sent), sum(c.sent_bytes for c in cost.moved(state, batches[0]))],
    }


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    results = {}
    for name, case in json.loads(cases.read_text()).items():
        results[name] = differing(recipe_of(cases.parent, "plain", case))
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
