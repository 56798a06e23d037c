"""What a run says of itself before it begins."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from trainspec.methods import leading_positions
from trainspec.plans.accelerators import Devices
from trainspec.plans.plan import COMPUTE_DTYPE, MESH_AXES, STORED_DTYPE, Plan
from trainspec.runs.memory import host_memory, positions_at_once
from trainspec.runs.run import Run


def opening(run: Run, devices: Devices, *, name: str, out: Path) -> list[str]:
    """The first lines of a run: versions, platform, devices, plan, precision, and where it writes."""
    recipe = run.recipe
    packages = ", ".join(f"{package} {version(package)}" for package in devices.packages)
    memory, _ = host_memory()
    policy = recipe.precision.policy
    system = " ".join((platform.system(), platform.release(), platform.machine()))
    return [
        f"{name} {version('twintrain')} with {packages} on Python {platform.python_version()}",
        f"host: {platform.node()}, {system}, {os.cpu_count()} cores, {memory / 2**30:,.1f} GiB of memory",
        f"devices: {devices}",
        f"plan: {_plan_in_words(recipe.plan)}, attention {devices.attention or recipe.plan.attention}, {loss_in_words(run)}",
        f"precision: {policy}, stored in {STORED_DTYPE[policy]}, computed in {COMPUTE_DTYPE[policy]}, "
        f"gradients summed in {COMPUTE_DTYPE[recipe.precision.reduce]}",
        f"writes: {out}",
    ]


def _plan_in_words(plan: Plan) -> str:
    axes = [f"{axis} {size}" for axis in MESH_AXES if (size := getattr(plan, axis)) > 1]
    words = [" × ".join(axes) or "one device", f"shards {plan.shards}", f"remat {plan.remat}"]
    if plan.pipe > 1:
        chunks = f" of {plan.chunks} chunks a stage" if plan.chunks_per_stage > 1 else ""
        words.append(f"schedule {plan.schedule}{chunks}, {plan.microbatches} microbatches")
    return ", ".join(words)


def loss_in_words(run: Run) -> str:
    """How many positions of a row the loss makes logits of at once."""
    positions = leading_positions(run.recipe.method) + run.recipe.data.sequence_tokens
    chunk = positions_at_once(run.recipe.plan, run)
    return f"loss of {chunk} positions at once" if chunk < positions else "loss of whole rows"


def describe(run: Run) -> str:
    """The sizes of the model, of the trained weights and of the adapter's files, in one line."""
    model, method, policy = run.spec, run.recipe.method, run.recipe.precision.policy
    tables = (run.model_table, run.trained, run.method_table)
    total, trained, extra = (sum(p.size for p in table) for table in tables)
    line = (
        f"{model.name}: {total:,} parameters; {method.kind} trains {trained:,} "
        f"({100 * trained / (total + extra):.2f} %)"
    )
    if method.trains_model:
        return line
    mebi = np.dtype(STORED_DTYPE[policy]).itemsize / 2**20
    line = f"{line}; its adapter has {method.adapter_size(model) * mebi:,.2f} MiB"
    return f"{line}, its encoder {trained * mebi:,.2f}" if method.has_encoder else line
