"""The report of a run: a progress bar, a line per step, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

# tensorboard's own writer: tensorboardX would import torch, where it is installed, into JAX's process.
from tensorboard.summary import Writer
from tqdm import tqdm

from trainspec.plans.accelerators import Devices
from trainspec.plans.plan import COMPUTE_DTYPE, MESH_AXES, STORED_DTYPE, Plan
from trainspec.recipe import Recipe
from trainspec.runs.memory import host_memory
from trainspec.runs.run import Run


@dataclass(frozen=True)
class StepReport:
    """One update, `step` counted from 1; `loss` is the mean over the batch's target tokens."""

    step: int
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    tokens_per_second: float
    heldout_loss: float | None = None


class Reporter:
    """Shows and records a run; a context manager. `resumed_at` is the last step already made."""

    def __init__(self, out: Path, *, backend: str, steps: int, resumed_at: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        metrics = out / "metrics.jsonl"
        _drop_steps_after(metrics, resumed_at)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._events = Writer(str(out))
        self._bar = tqdm(
            total=steps,
            initial=resumed_at,
            desc=backend,
            unit="step",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._events.close()
        self._metrics.close()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def step(self, report: StepReport) -> None:
        """Show and record one update."""
        values = {k: v for k, v in asdict(report).items() if v is not None}
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if name != "step":
                self._events.add_scalar(name, value, report.step)
        self._bar.update()
        heldout = "" if report.heldout_loss is None else f"  held-out {report.heldout_loss:.4f}"
        self.say(
            f"step {report.step:>5}  loss {report.loss:.4f}  |g| {report.grad_norm:.3e}  lr {report.lr:.2e}"
            f"  {report.tokens} tokens  {report.tokens_per_second:,.0f} target tokens/s{heldout}"
        )


class NullReporter:
    """The reporter of a process that is not the leader: it shows and records nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Do nothing."""

    def step(self, report: StepReport) -> None:
        """Do nothing."""


def opening(recipe: Recipe, devices: Devices, *, name: str, out: Path) -> list[str]:
    """The first lines of a run: versions, platform, devices, plan, precision, and where it writes."""
    packages = ", ".join(f"{package} {version(package)}" for package in devices.packages)
    memory, _ = host_memory()
    policy = recipe.precision.policy
    system = " ".join((platform.system(), platform.release(), platform.machine()))
    return [
        f"{name} {version('twintrain')} with {packages} on Python {platform.python_version()}",
        f"host: {platform.node()}, {system}, {os.cpu_count()} cores, {memory / 2**30:,.1f} GiB of memory",
        f"devices: {devices}",
        f"plan: {_plan_in_words(recipe.plan)}, attention {devices.attention or recipe.plan.attention}",
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


def _drop_steps_after(metrics: Path, step: int) -> None:
    """Drop the lines of the steps that a resumed run repeats."""
    if metrics.is_file():
        # A killed run may have left half a line at the end.
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        metrics.write_text(
            "".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8"
        )
