"""Runs of plans and of one process beside each other, and what they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from plan_cases import METHODS, MODELS, PRECISION, Case, Resumed
from ranks import Command, distance, drift, furthest, run_all, traced
from small import ROOT

from parity.runs.edit import Edit
from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.shards import ArrayKind, ShardFiles, files_of
from trainspec.files.adapters import write_adapter
from trainspec.init import initial_value
from trainspec.methods import Full, LoRA, adapter_table
from trainspec.model import ModelSpec
from trainspec.params import FromWeights, Normal
from trainspec.plans.pipeline import stages_of
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import resolve
from trainspec.trace import Trace

Make = Callable[..., Recipe]
PROOF = 1e-10  # of each tensor's largest entry; rounding stays near 1e-14
FP32_GRADIENT, FP32_LOSS = 1e-5, 3e-6
BF16_GRADIENT, BF16_LOSS = 0.04, 1e-3  # a few roundings to 8 bits, each 2⁻⁹
# DoRA divides by the norm of a weight: one process is 0.21 from its fp32 run, where a bottleneck adapter's is 0.03 from it. Its
# activations' gradients in fp32 are 2.2e-5 from those in float64 in one process, and 2.6e-5 over eight.
DORA_BF16_GRADIENT, DORA_FP32_ACTIVATION = 0.2, 3e-5
STEPS, LR = 3, 1e-3
RESUMED_UPDATE = 1e-3  # of the rate: what rounding of one gradient leaves of an update is about 3e-5
HELDOUT = ROOT / "configs/data/qa-heldout.jsonl"


def recipe_of(make: Make, case: Case, **run: Any) -> Recipe:
    # Below every gradient: those of virtual tokens are small.
    clip_norm = 0.5 if case.method in ("full", "lora") else 0.05
    recipe = make(
        case.model,
        method=METHODS[case.method],
        precision=PRECISION[case.precision],
        plan=dict(case.plan),
        batch={"global_examples": 24, "accumulation": 2},
        data={"sequence_tokens": 96, "too_long": "cut", "packing": case.packing},
        optimizer={"lr": LR, "weight_decay": 0.1, "clip_norm": clip_norm},
        run={"steps": STEPS} | run,
    )
    if isinstance(recipe.method, Full | LoRA):
        return recipe
    method = recipe.method.model_copy(update={"adapter": str(drawn_adapter(recipe, MODELS[case.model]))})
    return recipe.model_copy(update={"method": method})


def drawn_adapter(recipe: Recipe, spec: ModelSpec) -> Path:
    """An adapter none of whose weights is zero, so that all gradients count from the first step."""
    method = recipe.method
    words = "-".join(
        str(value) for value in method.model_dump(exclude_none=True, exclude={"adapter"}).values()
    )
    directory = Path(recipe.model.from_).parent / f"adapter-{spec.name}-{words}"
    if not directory.exists():
        weights = {
            # A length of DoRA's is about the norm that it stands for.
            p.name: initial_value(replace(p, init=Normal(0.3)), seed=4, dtype="float32")
            + np.float32(2 * isinstance(p.init, FromWeights))
            for p in adapter_table(spec, method)
        }
        write_adapter(directory, weights, model=spec, method=method, base=recipe.model.from_)
    return directory


def stopped_and_resumed(make: Make, resumed: Resumed, out: Path, *edits: Edit) -> list[Command]:
    # As the run that is not stopped: a step that records activations has attention in other pieces, which bfloat16 shows.
    recorded = ("--trace", f"{out}-trace", "--activations", "1")
    return [
        Command("train", recipe_of(make, resumed.first, stop_after_steps=STEPS - 1), out, recorded),
        Command("train", recipe_of(make, resumed.second), out, ("--resume",), edits),
    ]


def evaluated(make: Make, case: Case, out: Path) -> list[Command]:
    """Held-out losses, after an update and of the checkpoint."""
    recipe = recipe_of(make, case, steps=1)
    heldout = recipe.data.model_copy(update={"heldout": str(HELDOUT)})
    recipe = recipe.model_copy(update={"data": heldout})
    return [Command("train", recipe, out), Command("eval", recipe, out, ("--loss-only",))]


def run_cases(
    make: Make, home: Path, cases: list[Case], resumed: list[Resumed], evaluate: list[Case]
) -> Path:
    """One launch for each number of processes."""
    commands: dict[int, list[Command]] = {}

    def add(case: Case, *some: Command) -> None:
        commands.setdefault(case.processes, []).extend(some)

    for c in dict.fromkeys([*(c.alone for c in cases), *cases]):
        add(c, traced(recipe_of(make, c), directory_of(home, c)))
    for r in resumed:
        add(r.first, *stopped_and_resumed(make, r, home / str(r)))
    for c in [*(c.alone for c in evaluate), *evaluate]:
        add(c, *evaluated(make, c, directory_of(home, c) / "evaluated"))
    for processes, some in commands.items():
        run_all(some, home / f"launch-{processes}", processes=processes)
    return home


def directory_of(home: Path, case: Case) -> Path:
    return home / str(case)


def traces(home: Path, case: Case) -> tuple[Path, Path]:
    return directory_of(home, case.alone) / "trace", directory_of(home, case) / "trace"


# How `check` begins what it says; `check_resumed` says "restored".
APART = "too far apart:"


def check(
    left: Path,
    right: Path,
    precision: str,
    *,
    bf16: float = BF16_GRADIENT,
    fp32_activation: float = FP32_GRADIENT,
) -> None:
    losses = drift(left, right, "loss", steps=STEPS)
    bound = {"fp64": PROOF, "fp32": FP32_GRADIENT}.get(precision, bf16)
    assert furthest(left, right, "gradient", step=1) <= bound, f"{APART} gradient"
    assert drift(left, right, "grad_norm", steps=1) <= bound, f"{APART} grad_norm"
    assert furthest(left, right, "moment1", step=1) <= bound, f"{APART} moment1"  # of clipped gradients
    if precision == "fp64":
        assert losses <= PROOF, f"{APART} loss"
        assert drift(left, right, "grad_norm", steps=STEPS) <= PROOF, f"{APART} grad_norm"
        for step in range(1, STEPS + 1):
            for group in ("gradient", "update", "moment1", "moment2"):
                assert furthest(left, right, group, step=step) <= PROOF, f"{APART} {group} at {step}"
        assert furthest(left, right, "activation", step=1) <= PROOF, f"{APART} activation"
        backward = furthest(left, right, "activation_gradient", step=1)
        assert backward <= PROOF, f"{APART} activation_gradient"
    elif precision == "fp32":
        for group in ("activation", "activation_gradient"):
            distance_of_group = furthest(left, right, group, step=1)
            assert distance_of_group <= fp32_activation, f"{APART} {group}: {distance_of_group}"
        assert losses <= FP32_LOSS, f"{APART} loss"
    else:
        assert losses <= BF16_LOSS, f"{APART} loss"
        one, other = Trace(left), Trace(right)
        assert one.initial_names() == other.initial_names()
        for name in one.initial_names():  # masters are what the file says, not what bfloat16 makes of it
            np.testing.assert_array_equal(one.read_initial(name), other.read_initial(name))


def saved(checkpoint: Path) -> dict[ArrayKind, dict[str, NDArray[Any]]]:
    """The whole arrays of a checkpoint, read from the files of all processes."""
    manifest, arrays = read_manifest(checkpoint), {}
    for kind in get_args(ArrayKind):
        files = [checkpoint / name for name in files_of(kind, manifest.digests)]
        tensors = ShardFiles(files, manifest.shapes, where=checkpoint)
        arrays[kind] = {name: tensors.weight(name, None)[...] for name in tensors.shapes}
    return arrays


def check_saved(home: Path, case: Case) -> None:
    """Each process that trains something has written its files, and together they hold the moments that the trace has."""
    run = resolve(load_recipe(directory_of(home, case) / "run/recipe.yaml"))
    plan = run.recipe.plan
    stages = {stages_of(param, plan, run.spec)[0] for param in run.trained}  # an encoder is the first one's
    writers = case.processes // plan.pipe * len(stages)
    checkpoint = directory_of(home, case) / f"run/checkpoints/step-{STEPS:06d}"
    found, trace = saved(checkpoint), Trace(traces(home, case)[1])
    for kind in ("moment1", "moment2"):
        assert len(files_of(kind, (path.name for path in checkpoint.iterdir()))) == writers
        names = [name for name in trace.names(STEPS) if name.startswith(f"{kind}/")]
        assert names == sorted(f"{kind}/{name}" for name in found[kind])
        for name in names:
            np.testing.assert_array_equal(found[kind][name.partition("/")[2]], trace.read(STEPS, name))


def check_resumed(home: Path, resumed: Resumed, out: Path) -> None:
    last = f"checkpoints/step-{STEPS:06d}"
    unbroken = directory_of(home, resumed.first) / "run" / last
    left, right = saved(unbroken), saved(out / last)
    is_proof = resumed.first.precision == "fp64"
    for kind in ("moment1", "moment2"):
        bound = PROOF if is_proof else FP32_GRADIENT
        assert distance(left[kind], right[kind]) <= bound, f"restored {kind}"
    moved = [np.abs(left["weights"][name] - array).max() for name, array in right["weights"].items()]
    assert np.max(moved) <= (PROOF if is_proof else RESUMED_UPDATE) * LR, "restored weights"


def check_evaluated(home: Path, case: Case) -> None:
    """After an update and from the checkpoint, under the plan and alone: all are the same."""
    said = []
    for each in (case.alone, case):
        out = directory_of(home, each) / "evaluated"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        words = (out / "said.txt").read_text().split()
        assert words[:2] == ["held-out", "loss"]
        said += [lines[-1]["heldout_loss"], float(words[2])]
    assert np.ptp(said) <= FP32_LOSS * np.mean(said)
    assert abs(lines[-1]["loss"] - said[0]) > 100 * FP32_LOSS * said[0]  # control: of other examples
