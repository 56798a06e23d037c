"""Where the time of torchtrain's updates goes: its phases, torch's operators, and what makes the host wait for a device.

    python benchmarks/torch_profile.py RECIPE [--set KEY=VALUE ...] [--updates N] [--rows N]

Times are per update, of the updates after two of warm-up. An operator's time is its own, without what it calls.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from torchtrain.cluster import describe_devices, finish, start
from torchtrain.step import State, init_state, train_step
from trainspec.data import Dataset, open_dataset
from trainspec.recipe import load_recipe

WARM_UP_UPDATES = 2
# Each makes the host wait until a device has done what it was asked for.
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rows", type=int, default=15, help="how many operators are listed")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = start(recipe)
    try:
        print(
            f"{' '.join([str(arguments.recipe), *arguments.overrides])}, on {describe_devices(recipe.plan)}"
        )
        state, dataset = init_state(run), open_dataset(run, "train")
        state = updated(state, dataset, WARM_UP_UPDATES)
        with phases_timed(state) as seconds:
            state = updated(state, dataset, arguments.updates)
        for name, total in seconds.items():
            print(f"{name:12} {1e3 * total / arguments.updates:10.1f} ms")
        with profile(activities=activities()) as profiled:
            updated(state, dataset, arguments.updates)
        for line in operators(profiled, arguments.updates, arguments.rows):
            print(line)
    finally:
        finish()


def activities() -> list[ProfilerActivity]:
    """What is recorded: the host, and the GPU where there is one."""
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]


def updated(state: State, dataset: Dataset, updates: int) -> State:
    """The state after that many updates."""
    for _ in range(updates):
        batch = dataset.batch(state.step, state.run.recipe.batch.global_examples)
        state, _ = train_step(state, batch, lr=state.run.recipe.optimizer.lr)
    return state


@contextmanager
def phases_timed(state: State) -> Iterator[dict[str, float]]:
    """Seconds of each phase of all updates in the block; the device is waited for at the end of each."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - began
            return result

        return call

    engine = state.engine
    with (
        patch.object(engine, "accumulate", timed("passes", engine.accumulate)),
        patch.object(engine.store, "norm", timed("norm", engine.store.norm)),
        patch.object(engine, "step", timed("update", engine.step)),
    ):
        began = time.perf_counter()
        yield seconds
        seconds["everything"] = time.perf_counter() - began


def operators(profiled: Any, updates: int, rows: int) -> Iterator[str]:
    """The operators that take longest, and what the host waits for."""
    events = profiled.key_averages()
    own = sorted(events, key=lambda e: e.self_cpu_time_total + e.self_device_time_total, reverse=True)
    yield f"{'operator':44} {'calls':>8} {'CPU ms':>9} {'device ms':>10}"
    for event in own[:rows]:
        cpu, device = (1e-3 * t / updates for t in (event.self_cpu_time_total, event.self_device_time_total))
        yield f"{event.key[:44]:44} {event.count / updates:8.1f} {cpu:9.2f} {device:10.2f}"
    counts = {event.key: event.count / updates for event in events}
    waits = ", ".join(f"{counts[name]:.1f} × {name}" for name in WAITS if name in counts)
    yield f"the host waits for a device, per update: {waits or 'never'}"


if __name__ == "__main__":
    main()
