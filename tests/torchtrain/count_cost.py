"""What recipes cost a process, counted in processes of a launcher; see test_cost.py.

CASES is a list of recipe files. For each the leader writes what it holds after the backward pass that leaves most, what
its collectives moved in its second step and, if weights are split, in a first step of one microbatch, and how much of the
model was whole while weights were filled.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from torchtrain import cluster, cost, step, weights  # noqa: E402
from trainspec.data import open_dataset  # noqa: E402
from trainspec.recipe import load_recipe  # noqa: E402
from trainspec.runs.run import resolve  # noqa: E402


def moved_first(file: Path) -> list[dict[str, object]]:
    """The collectives of a run's very first microbatch, in which DeepSpeed fetches nothing ahead."""
    recipe = load_recipe(file, ["batch.accumulation=1"])
    cluster.start(recipe)
    state = step.init_state(resolve(recipe))
    batch = open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    collectives = [asdict(collective) for collective in cost.moved(state, batch)]
    cluster.finish()
    return collectives


def largest(held: dict[str, int]) -> dict[str, int]:
    """What the process holds that holds most."""
    every: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, held)
    return max(every, key=lambda each: sum(each.values()))


def measured(file: Path) -> dict[str, object]:
    recipe = load_recipe(file)
    cluster.start(recipe)
    whole: list[int] = []  # elements that are whole in memory, before each parameter gets its own
    allocate = weights.allocate

    def watched(model, entries, **how):
        def each():
            for entry in entries:
                parameters = [p for p in model.parameters() if p.device.type != "meta"]
                whole.append(sum(p.numel() for p in parameters))
                yield entry

        allocate(model, each(), **how)

    step.allocate = watched
    state = step.init_state(resolve(recipe))
    step.allocate = allocate
    batch = open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    held = largest(cost.held(state, batch)) if recipe.plan.pipe > 1 else cost.held(state, batch)
    moved = [asdict(collective) for collective in cost.moved(state, batch)]
    cluster.finish()
    first = moved_first(file) if recipe.plan.shards == "params" else None
    return {"held": held, "moved": moved, "first": first, "whole": max(whole)}


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    measurements = [measured(Path(file)) for file in json.loads(cases.read_text())]
    if cluster.is_leader():
        results.write_text(json.dumps(measurements))


if __name__ == "__main__":
    main()
