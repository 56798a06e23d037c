"""What the loss in chunks costs, and what memory it saves: our own step with all logits at once and in chunks, in turns.

    python benchmarks/loss_chunks.py [--backend jax torch] [--vocab 1024 32000] [--chunk 128] [--rows 4] [--steps 9]

A model of 8 layers, 512 wide, every weight trained, rows of 512 tokens, on two threads. One process makes both
kinds of step on the same weights one after the other, so that a busy machine slows both, and the cost is the median of the
pairs' ratios. Memory is the largest that a process has which makes steps of one kind only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from trainspec.data import Batch
from trainspec.families import PRESETS
from trainspec.plans.plan import Policy
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, run_of

TOKENS, THREADS = 512, 2
WARM_UP_STEPS, MEMORY_STEPS = 2, 2
MODEL = replace(PRESETS["tiny"], embed=512, layers=8, heads=8, kv_heads=8, head_dim=64, mlp=1376)


def main() -> None:
    """Time every case in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", nargs="+", choices=("jax", "torch"), default=("jax", "torch"))
    parser.add_argument("--vocab", nargs="+", type=int, default=(1024, 32_000))
    parser.add_argument("--chunk", type=int, default=128, help="positions of each row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9, help="of each kind")
    parser.add_argument("--policy", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worked(json.loads(arguments.worker))))
        return
    print(f"{' '.join(sys.argv)}\n{platform.processor() or platform.machine()}, {THREADS} threads")
    for vocab in arguments.vocab:
        for backend in arguments.backend:
            case = {
                "backend": backend,
                "vocab": vocab,
                "rows": arguments.rows,
                "policy": arguments.policy,
                "chunks": [TOKENS, arguments.chunk],
            }
            plain, chunks = np.array(in_a_process(case | {"steps": arguments.steps})["seconds"]).T
            print(
                f"{backend:5} vocabulary {vocab:6,}: {median(plain) * 1e3:7.0f} ms/step at once, "
                f"{median(chunks) * 1e3:7.0f} in chunks of {arguments.chunk}: {median(chunks / plain) - 1:+.1%}",
                flush=True,
            )
            for chunk in case["chunks"]:
                used = in_a_process(case | {"steps": MEMORY_STEPS, "chunks": [chunk]})["bytes"]
                print(f"      {chunk:4} positions at once: {used / 2**20:6.0f} MiB", flush=True)


def in_a_process(case: dict[str, Any]) -> Any:
    """What `worked` gives: JAX and torch never share a process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(THREADS),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, __file__, "--worker", json.dumps(case)]
    ended = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def worked(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step after the warm-up, of each kind, and the bytes that the process had at most."""
    step_of = jax_steps if case["backend"] == "jax" else torch_steps
    runs = [run(case["vocab"], case["rows"], chunk, case["policy"]) for chunk in case["chunks"]]
    step, seconds = step_of(runs), []
    for _ in range(WARM_UP_STEPS + case["steps"]):
        row = []
        for kind in range(len(runs)):
            start = perf_counter()
            step(kind)
            row.append(perf_counter() - start)
        seconds.append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    return {"seconds": seconds[WARM_UP_STEPS:], "bytes": peak}


def run(vocab: int, rows: int, chunk: int, policy: Policy) -> Run:
    """A run that makes the loss of so many positions at once."""
    recipe = Recipe.model_validate(
        {
            "model": {"from": "preset:tiny", "weights": "random"},
            "method": {"kind": "full"},
            "data": {"train": "none", "sequence_tokens": TOKENS},
            "batch": {"global_examples": rows, "accumulation": 1},
            "precision": {"policy": policy},
            "plan": {"loss_chunk": chunk},
        }
    )
    return run_of(recipe, replace(MODEL, vocab=vocab), None)


def batch(run: Run) -> Batch:
    """Rows without padding; every token is a target."""
    rows = run.recipe.batch.global_examples
    ids = np.random.default_rng(0).integers(0, run.spec.vocab, (rows, TOKENS), dtype=np.int32)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (rows, 1))
    return Batch(ids, ids, positions, np.ones_like(ids), np.arange(rows, dtype=np.int32))


def jax_steps(runs: list[Run]) -> Callable[[int], None]:
    """Makes an update of one kind, all on the same weights."""
    import jax

    jaxtrain, make_mesh, program_of = (
        importlib.import_module("jaxtrain.step"),
        importlib.import_module("jaxtrain.mesh").make_mesh,
        importlib.import_module("jaxtrain.program").Program,
    )
    importlib.import_module("jaxtrain.precision").use_precision(runs[0].recipe.precision.policy)
    state = jaxtrain.init_state(runs[0])
    programs = [state.program, *(program_of(each, make_mesh(each.recipe.plan)) for each in runs[1:])]
    examples = batch(runs[0])

    def step(kind: int) -> None:
        nonlocal state
        state, _ = jaxtrain.train_step(replace(state, program=programs[kind]), examples, lr=1e-4)
        jax.block_until_ready(state.trainable)

    return step


def torch_steps(runs: list[Run]) -> Callable[[int], None]:
    """Makes an update of one kind, all on the same weights."""
    cluster, torchtrain = (importlib.import_module(f"torchtrain.{name}") for name in ("cluster", "step"))
    cluster.start(runs[0].recipe)
    state = torchtrain.init_state(runs[0])
    examples = batch(runs[0])

    def step(kind: int) -> None:
        nonlocal state
        state, _ = torchtrain.train_step(replace(state, run=runs[kind]), examples, lr=1e-4)

    return step


if __name__ == "__main__":
    main()
