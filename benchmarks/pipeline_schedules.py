"""The pipeline's schedules: what they leave unused, what they keep in memory, and what they look like.

    python benchmarks/pipeline_schedules.py [--page docs/pipeline.md]

Slots are counted in the timeline that each backend's executor goes by, and set beside the formula of
`trainspec.plans.pipeline`. Memory is what XLA's compiler says of JAX's gradient program on fake CPU devices. With `--page` the
tables are written there, and the pictures beside it, in a directory of the page's name.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainspec.backends import BACKENDS
from trainspec.families import PRESETS
from trainspec.plans.capabilities import expected_bubble
from trainspec.plans.pipeline import Timeline, Work, bubble
from trainspec.plans.plan import Backend, Plan
from trainspec.recipe import Recipe
from trainspec.runs.run import run_of

SCHEDULES: tuple[tuple[Backend, str], ...] = (
    ("jax", "gpipe"),
    ("jax", "interleaved"),
    ("jax", "1f1b"),
    ("torch", "1f1b"),
)
STAGES, MICROBATCHES = (2, 4, 8), (4, 8, 16, 32)
DRAWN_STAGES, DRAWN_MICROBATCHES = 4, 8
WEIGHED_STAGES, WEIGHED_ROWS, WEIGHED_TOKENS = 4, 4, 128
WEIGHED_MODEL = replace(PRESETS["tiny"], layers=8, embed=256, heads=4, kv_heads=2, head_dim=64, mlp=512)
REMATS = ("none", "full")
HEAD = """# Pipelines

Made by `python benchmarks/pipeline_schedules.py --page docs/pipeline.md`, on CPU.

`plan.pipe` cuts the layers into stages; `plan.microbatches` go through them in the order of `plan.schedule`. What each
schedule is for:

- **gpipe** (JAX): all forward passes, then all backward passes. Keeps every microbatch until its backward pass.
- **1f1b**: a stage starts the backward pass of a microbatch as soon as it can, so that memory depends on the number of
  stages, not of microbatches. torch's (DeepSpeed's) is idle as little as gpipe. JAX's runs in lockstep: in every pair of
  slots all stages make one forward and one backward pass, and the backward pass recomputes the stage's forward pass; it
  costs time, and takes the least memory.
- **interleaved** (JAX): a stage has `plan.chunks` model chunks, so that it waits for a shorter pass only.

torch has 1f1b, with `shards: nothing` or `optimizer`; `trainspec show` says so in one line with the plan to use instead.

| key | default | what it says |
|---|---|---|
| `plan.pipe` | 1 | stages; layers are split evenly and in order, the first stages have one more where they do not divide |
| `plan.microbatches` | 1 | into how many an accumulation slice is split; under interleaved a multiple of `pipe` |
| `plan.schedule` | 1f1b | 1f1b, gpipe or interleaved |
| `plan.chunks` | 2 | model chunks per stage, under interleaved only |

Microbatches and accumulation multiply. DeepSpeed sends all of accumulation × microbatches through the pipeline in one go; JAX
drains it after each accumulation slice. So in a pipeline set `batch.accumulation=1` and raise `plan.microbatches`.
[pipeline-on-tpu.md](pipeline-on-tpu.md) has what Llama-2-70B takes on a pod.

```sh
jaxtrain train configs/demo.yaml --set plan.pipe=2 --set plan.microbatches=4 --set plan.schedule=gpipe --out runs/pipe
torchtrain train configs/demo.yaml --set plan.pipe=2 --set plan.microbatches=4 --out runs/pipe-torch
parity check configs/demo.yaml --left "jax plan.pipe=2 plan.microbatches=4" --right "torch plan.pipe=2 plan.microbatches=4" \\
  --precision fp32 --steps 3
```
"""


def main() -> None:
    """Count, weigh and draw; print the page or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, help="write Markdown there, and the pictures beside it")
    parser.add_argument("--worker", choices=("jax", "torch", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "memory":
        print(json.dumps(list(temporary_bytes())))
        return
    if arguments.worker:
        print(json.dumps(timelines(arguments.worker)))
        return
    found = {key: t for backend in ("jax", "torch") for key, t in counted(backend).items()}
    weighed = _worker("memory")
    page = HEAD + bubble_table(found) + memory_table(weighed)
    if not arguments.page:
        print(page)
        return
    pictures = arguments.page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    page += (
        "\n## What they look like\n\nFour stages (rows), eight microbatches (numbers), time to the right; "
    )
    page += "forward passes are blue, backward passes orange, the second chunk of a stage darker.\n"
    for backend, schedule in SCHEDULES:
        name = f"{backend}-{schedule}.svg"
        timeline = found[backend, schedule, DRAWN_STAGES, DRAWN_MICROBATCHES]
        (pictures / name).write_text(drawn(timeline))
        page += f"\n**{backend}, {schedule}**: {float(bubble(timeline)):.1%} unused\n\n"
        page += f"![{backend} {schedule}]({pictures.name}/{name})\n"
    arguments.page.write_text(page)


def plan_of(schedule: str, stages: int) -> Plan:
    """A plan of that schedule and nothing else."""
    return Plan.model_validate({"pipe": stages, "schedule": schedule})


def timelines(backend: Backend) -> list[dict[str, Any]]:
    """In a process of the backend: every timeline of its schedules."""
    modules = {"jax": "jaxtrain.pipeline", "torch": "torchtrain.engines.pipeline"}
    pipeline = importlib.import_module(modules[backend])
    return [
        {
            "key": [backend, schedule, stages, microbatches],
            "stages": [
                [work and [work.kind, work.microbatch, work.chunk] for work in stage]
                for stage in pipeline.timeline(plan_of(schedule, stages), microbatches)
            ],
        }
        for (whose, schedule), stages, microbatches in itertools.product(SCHEDULES, STAGES, MICROBATCHES)
        if whose == backend and not (schedule == "interleaved" and microbatches % stages)
    ]


def counted(backend: Backend) -> dict[tuple[Any, ...], Timeline]:
    """The timelines by backend, schedule, stages and microbatches."""
    return {
        tuple(one["key"]): tuple(tuple(work and Work(*work) for work in stage) for stage in one["stages"])
        for one in _worker(backend)
    }


def _worker(what: str) -> Any:
    """JAX and torch never share a process."""
    command = [sys.executable, __file__, "--worker", what]
    quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, check=True, env=os.environ | quiet, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def bubble_table(found: Mapping[tuple[Any, ...], Timeline]) -> str:
    """Idle slots of all slots, counted; `!` where the formula says something else. After it what a stage keeps."""
    lines = [
        "\n## The bubble\n",
        "The share of time slots in which a stage is idle, counted in the schedule; the formula",
        "(`trainspec.plans.capabilities.expected_bubble`) agrees in every cell. After the slash: the largest number of microbatches",
        "(of one model chunk) for which the first stage keeps activations.\n",
        "| backend | schedule | stages | " + " | ".join(f"{m} microbatches" for m in MICROBATCHES) + " |",
        "|---|---|---|" + "---|" * len(MICROBATCHES),
    ]
    for (backend, schedule), stages in itertools.product(SCHEDULES, STAGES):
        cells = []
        for microbatches in MICROBATCHES:
            timeline = found.get((backend, schedule, stages, microbatches))
            if timeline is None:
                cells.append(f"in groups of {stages}")
                continue
            share = bubble(timeline)
            expected = expected_bubble(plan_of(schedule, stages), microbatches, BACKENDS[backend])
            assert share == expected, (backend, schedule, stages, microbatches, share, expected)
            cells.append(f"{float(share):.1%} / {in_flight(timeline[0])}")
        lines.append(f"| {backend} | {schedule} | {stages} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_flight(stage: Sequence[Work | None]) -> int:
    """How many forward passes of a stage wait for their backward pass at most."""
    open_passes = most = 0
    for work in stage:
        if work is not None:
            open_passes += 1 if work.kind == "forward" else -1
            most = max(most, open_passes)
    return most


def temporary_bytes() -> Iterator[dict[str, Any]]:
    """In a process with JAX: what the gradient program takes besides weights, batch and gradients, per device.

    Only compiled, for shapes: nothing is trained.
    """
    import jax

    from jaxtrain.mesh import make_mesh
    from jaxtrain.program import Program

    jax.config.update("jax_num_cpu_devices", WEIGHED_STAGES)
    for remat, schedule, microbatches in itertools.product(
        REMATS, ("gpipe", "interleaved", "1f1b"), MICROBATCHES
    ):
        recipe = Recipe.model_validate(
            {
                "model": {"from": "preset:tiny", "weights": "random"},
                "method": {"kind": "full"},
                "data": {"train": "none", "sequence_tokens": WEIGHED_TOKENS},
                "batch": {"global_examples": WEIGHED_ROWS * microbatches, "accumulation": 1},
                "plan": {
                    "pipe": WEIGHED_STAGES,
                    "schedule": schedule,
                    "microbatches": microbatches,
                    "remat": remat,
                },
            }
        )
        program = Program(run_of(recipe, WEIGHED_MODEL, None), make_mesh(recipe.plan))
        lowered = program.gradients.lower(
            program.storage.shapes(program.run.trained, "weights", program.storage.compute_dtype),
            {},
            program.feeder.slice_shapes(),
            jax.ShapeDtypeStruct((), "int32"),
            record_activations=False,
        )
        sizes = lowered.compile().memory_analysis()
        assert sizes is not None  # every backend that trains has it
        yield {
            "remat": remat,
            "schedule": schedule,
            "microbatches": microbatches,
            "bytes": sizes.temp_size_in_bytes,
        }


def memory_table(weighed: Sequence[Mapping[str, Any]]) -> str:
    """MiB against the number of microbatches of the same size."""
    lines = [
        "\n## What is kept in memory\n",
        f"JAX, fp32, {WEIGHED_STAGES} stages of two layers, {WEIGHED_ROWS} examples of {WEIGHED_TOKENS} tokens in a microbatch: MiB of temporary memory per device of the program that",
        "makes the gradients, from the compiler's `memory_analysis()`. The batch grows with the microbatches, and 1f1b's memory",
        "does not.\n",
        "| remat | schedule | " + " | ".join(f"{m} microbatches" for m in MICROBATCHES) + " |",
        "|---|---|" + "---|" * len(MICROBATCHES),
    ]
    for (remat, schedule), row in itertools.groupby(weighed, key=lambda w: (w["remat"], w["schedule"])):
        sizes = " | ".join(f"{w['bytes'] / 2**20:.1f}" for w in row)
        lines.append(f"| {remat} | {schedule} | {sizes} |")
    return "\n".join(lines) + "\n"


CELL, LABEL = 18, 56
COLOURS = {
    ("forward", 0): "#9ecae8",
    ("forward", 1): "#3d8fc4",
    ("backward", 0): "#f6b26b",
    ("backward", 1): "#c9701a",
}


def drawn(timeline: Timeline) -> str:
    """A timeline as SVG: a row for each stage, a box for each slot, its microbatch in it."""
    slots = len(timeline[0])
    width, height = LABEL + slots * CELL + 2, len(timeline) * CELL + 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="10" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for stage, row in enumerate(timeline):
        middle = stage * CELL + 13
        parts.append(f'<text x="{LABEL / 2}" y="{middle}">stage {stage}</text>')
        for slot, work in enumerate(row):
            x, y = LABEL + slot * CELL + 1, stage * CELL + 1
            colour = COLOURS[work.kind, work.chunk % 2] if work else "#f2f2f2"
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>')
            if work:
                parts.append(f'<text x="{x + CELL / 2}" y="{middle}">{work.microbatch}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
