"""Lower the update of recipes to the compiler's language with weights that are shapes only, as JSON.

    python tests/jaxtrain/lower_recipes.py CASES.json OUT.json

CASES: [{"file": ..., "settings": [...], "wrong": NAME or null}]. `wrong` names a native weight that gets a dimension too
many: the control, which must not lower. The first case has the most devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import cluster
from jaxtrain.mesh import make_mesh
from jaxtrain.optim import Moments, rates
from jaxtrain.program import Program
from trainspec.recipe import load_recipe


def lowered(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(Path(case["file"]), case["settings"])
    run = cluster.start(recipe)
    program = Program(run, make_mesh(recipe.plan))
    storage = program.storage
    trainable = storage.shapes(run.trained, "weights", storage.compute_dtype)
    stored = storage.shapes(run.trained, "optimizer", storage.stored_dtype)
    master = stored if storage.stored_dtype != storage.compute_dtype else {}
    frozen = storage.shapes(run.frozen, "weights", storage.compute_dtype)
    weights = trainable | frozen
    if name := case["wrong"]:
        shape = weights[name].shape
        for kind in (trainable, frozen):
            kind |= {name: replace_shape(kind[name], (*shape[:-1], shape[-1] + 1))} if name in kind else {}
    frozen |= program.feeder.constants(program.constants)
    scalars = rates(recipe.optimizer, lr=recipe.optimizer.lr, step=0)
    before = live_bytes()
    try:
        low = program.train.lower(
            trainable, frozen, master, Moments(stored, dict(stored)), program.feeder.slice_shapes(),
            jax.ShapeDtypeStruct((), jnp.int32), scalars,
        )  # fmt: skip
    except TypeError as error:
        return {"error": str(error).splitlines()[0]}
    _, (new, new_master, moments) = low.out_info
    same = all(
        {n: (a.shape, a.dtype) for n, a in out.items()} == {n: (a.shape, a.dtype) for n, a in given.items()}
        for out, given in ((new, trainable), (new_master, master), (moments.moment1, stored))
    )
    return {
        "devices": recipe.plan.devices,
        "weight_bytes": sum(w.size * w.dtype.itemsize for w in weights.values()),
        "live_bytes": live_bytes() - before,
        "same_state": same,
    }


def replace_shape(struct: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, struct.dtype, sharding=struct.sharding)


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps([lowered(case) for case in json.loads(cases.read_text())]))


if __name__ == "__main__":
    main()
