"""How long jaxtrain's train step takes to trace and compile with many layers, beside few.

    python benchmarks/compile_time.py [--layers 4 80] [--policy fp32] [--method full] [--rounds N]

In a loop of layers the program is the same whatever their number, and so should be its compile time. On a CPU a model of this width and
few layers has no loop (docs/decisions/0029). Each number of layers has a process of its own in every round, without the compilation
cache; no weights are made. The sizes are those of the 28 M model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from bench_recipe import MODELS, Case, model_config
from turns import command_line, machine


def main() -> None:
    """Compile with every number of layers in turns, and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 80])
    parser.add_argument("--policy", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(compiled(arguments.worker, arguments.policy, arguments.method)))
        return
    print(
        f"`{command_line()}`\n\n{machine()}\n\n| layers | traced, s | compiled, s | core s | scratch memory, MiB |\n|---|---|---|---|---|"
    )
    found: dict[int, list[dict[str, float]]] = {layers: [] for layers in arguments.layers}
    for _ in range(arguments.rounds):
        for layers in arguments.layers:
            command = [sys.executable, __file__, "--worker", str(layers), "--policy", arguments.policy]
            command += ["--method", arguments.method]
            environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[layers].append(json.loads(done.stdout))
    for layers, rounds in found.items():
        middle = {key: median(each[key] for each in rounds) for key in rounds[0]}
        print(
            f"| {layers} | {middle['traced']:.2f} | {middle['compiled']:.2f} | {middle['core']:.2f} | {middle['scratch']:,.0f} |"
        )
    few, many = (found[layers] for layers in arguments.layers)
    for kind in ("compiled", "core"):
        ratio = median(b[kind] / a[kind] for a, b in zip(few, many, strict=True))
        print(f"\n{arguments.layers[1]} layers ÷ {arguments.layers[0]}, {kind}: {ratio:.2f}")


def compiled(layers: int, policy: str, method: str) -> dict[str, float]:
    """Seconds to trace and to compile the train step of a model of so many layers; core seconds of both; MiB."""
    import jax

    from jaxtrain.cluster import start
    from jaxtrain.mesh import make_mesh
    from jaxtrain.optim import Moments, rates
    from jaxtrain.program import Program
    from trainspec.recipe import load_recipe

    case = Case("28m", method, policy)
    recipe = load_recipe(case.write(model=model_config({**MODELS["28m"], "num_hidden_layers": layers})), [])
    run = start(recipe)
    program = Program(run, make_mesh(recipe.plan))
    storage = program.storage
    stored: Any = storage.shapes(run.trained, "optimizer", storage.stored_dtype)
    trainable = storage.shapes(run.trained, "weights", storage.compute_dtype)
    frozen = storage.shapes(run.frozen, "weights", storage.compute_dtype)
    frozen |= {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in program.constants.items()}
    master = stored if storage.stored_dtype != storage.compute_dtype else {}
    scalars = rates(recipe.optimizer, lr=recipe.optimizer.lr, step=0)
    began, used = time.perf_counter(), time.process_time()
    lowered = program.train.lower(
        trainable, frozen, master, Moments(stored, stored), program.feeder.slice_shapes(),
        jax.ShapeDtypeStruct((), "int32"), scalars,
    )  # fmt: skip
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return {
        "traced": traced - began,
        "compiled": time.perf_counter() - traced,
        "core": time.process_time() - used,
        "scratch": memory.temp_size_in_bytes / 2**20,
    }


if __name__ == "__main__":
    main()
