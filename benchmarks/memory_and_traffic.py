"""What a device holds and moves under every `plan.shards`, beside the arithmetic of `trainspec.plans.cost`.

    python benchmarks/memory_and_traffic.py [RECIPE] [--devices 1 2 4 8] [--page docs/memory-and-traffic.md]

JAX is read from its compiled programs (eight fake CPU devices), torch is counted in real processes over gloo: bytes of
weights, gradients, master weights and moments per device, and the bytes that collectives send in a step, as a ring
sends them. Psi is the bytes of the trained weights in the type they are computed with.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainspec.backends import BACKENDS
from trainspec.data import Batch, open_dataset
from trainspec.errors import PlanError
from trainspec.plans.cost import width
from trainspec.plans.plan import COMPUTE_DTYPE, Backend, Policy, local_size
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import cost_of, resolve, resolve_on

SHARDS = ("nothing", "optimizer", "gradients", "params")
METHODS: dict[str, Sequence[str]] = {"full": ("method={kind: full}",), "lora": ()}
POLICIES: tuple[Policy, ...] = ("bf16", "fp32")
HEAD = """# Memory and traffic

Made by `python benchmarks/memory_and_traffic.py --page docs/memory-and-traffic.md`, on CPU.

Bytes per device, in KiB: what is held of weights, gradients (between two microbatches), master weights and moments, and
what a step of one microbatch sends over `fsdp`, as a ring sends it. *said* is the arithmetic of `trainspec.plans.cost`, which has
the reason where a backend departs from ZeRO's paper. JAX's figures are read from its programs (memory from the compiled,
traffic from the partitioned one), torch's are counted in real processes over gloo. Gradients are summed in the type that is
computed with. Ψ is the size of the trained weights in that type; times N / (N - 1) the last column is ZeRO's 2Ψ, 2Ψ, 2Ψ and
3Ψ for `shards` from nothing to params (arXiv 1910.02054, section 7). Under LoRA the frozen weights travel beside it.

- torch keeps a gradient whole that lies across the end of a process's stretch of the flat buffer: some KiB above what is said.
- An all-reduce of which only a slice is used counts as a reduce-scatter: TPU and GPU compilers make it one, XLA's CPU compiler
  does not.
"""


@dataclass(frozen=True)
class Case:
    """One recipe to be weighed."""

    method: str
    policy: Policy
    devices: int
    shards: str

    def recipe(self, path: Path, *, accumulation: int = 1) -> Recipe:
        """The recipe at `path` under this case's plan, with 8 rows in a microbatch."""
        settings = [
            *METHODS[self.method], f"precision.policy={self.policy}", f"precision.reduce={self.policy}",
            f"plan.fsdp={self.devices}", f"plan.shards={self.shards}", f"batch.global_examples={8 * accumulation}",
            f"batch.accumulation={accumulation}", "data.sequence_tokens=64",
        ]  # fmt: skip
        return load_recipe(path, settings)


def main() -> None:
    """Weigh every case on both backends and print, or write, the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--page", type=Path, help="write Markdown there")
    parser.add_argument("--worker", nargs=3, metavar=("BACKEND", "CASES", "RESULTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        backend, cases, results = arguments.worker
        weigh_all(backend, Path(cases), Path(results), arguments.recipe)
        return
    every = [
        Case(method, policy, devices, shards)
        for method, policy in itertools.product(METHODS, POLICIES)
        for devices, shards in itertools.product(arguments.devices, SHARDS)
        if devices > 1 or shards == "nothing"
    ]
    found: dict[Backend, dict[Case, dict[str, float]]] = {
        backend: weigh(backend, every, arguments.recipe) for backend in BACKENDS
    }
    page = HEAD + "".join(
        table(
            method,
            policy,
            [c for c in every if (c.method, c.policy) == (method, policy)],
            found,
            arguments.recipe,
        )
        for method, policy in itertools.product(METHODS, POLICIES)
    )
    if arguments.page:
        arguments.page.write_text(page)
    else:
        print(page)


def weigh(backend: Backend, cases: Sequence[Case], recipe: Path) -> dict[Case, dict[str, float]]:
    """What the cases that the backend supports hold and move: one launch for each number of processes."""
    found: dict[Case, dict[str, float]] = {}
    supported = [case for case in cases if _is_supported(case, backend, recipe)]
    sizes = sorted({case.devices for case in supported}) if backend == "torch" else [1]
    for processes in sizes:
        group = [case for case in supported if backend == "jax" or case.devices == processes]
        with tempfile.TemporaryDirectory() as scratch:
            work, results = Path(scratch) / "cases.json", Path(scratch) / "results.json"
            work.write_text(json.dumps([asdict(case) for case in group]))
            command = [sys.executable]
            if processes > 1:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
                command += ["--log-dir", scratch]  # it would leave one of its own
            command += [__file__, str(recipe), "--worker", backend, str(work), str(results)]
            quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=os.environ | quiet, stdout=subprocess.DEVNULL)
            found |= dict(zip(group, json.loads(results.read_text()), strict=True))
    return found


def _is_supported(case: Case, backend: Backend, recipe: Path) -> bool:
    try:
        resolve_on(case.recipe(recipe), BACKENDS[backend])
    except PlanError:
        return False
    return True


def weigh_all(backend: str, cases: Path, results: Path, recipe: Path) -> None:
    """In a process of the backend: weigh each case."""
    chosen = [Case(**case) for case in json.loads(cases.read_text())]
    # JAX makes its fake devices once: the largest plan first.
    order = sorted(range(len(chosen)), key=lambda i: -chosen[i].devices)
    found = {i: weigh_one(backend, chosen[i], recipe) for i in order}
    if os.environ.get("RANK", "0") == "0":
        results.write_text(json.dumps([found[i] for i in range(len(chosen))]))


def weigh_one(backend: str, case: Case, recipe: Path) -> dict[str, float]:
    """Bytes held by part, and `sent`: the bytes that one device sends in a step."""
    # Gradients are there between two backward passes, and it is there that they are most.
    with started(backend, case.recipe(recipe, accumulation=2)) as (cost, state, batch):
        held = cost.held(state, batch)
    with started(backend, case.recipe(recipe)) as (cost, state, batch):
        return held | {"sent": sum(c.sent_bytes for c in cost.moved(state, batch))}


@contextmanager
def started(backend: str, recipe: Recipe) -> Iterator[tuple[Any, Any, Batch]]:
    """The backend's cost module, a run before its first update, and its first batch."""
    cluster, step, cost = (
        importlib.import_module(f"{backend}train.{m}") for m in ("cluster", "step", "cost")
    )
    cluster.start(recipe)
    try:
        state = step.init_state(resolve(recipe))
        yield cost, state, open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    finally:
        cluster.finish()


def table(
    method: str,
    policy: Policy,
    cases: Sequence[Case],
    found: Mapping[Backend, Mapping[Case, Mapping[str, Any]]],
    recipe: Path,
) -> str:
    """Markdown for one method and precision."""
    lines = [
        f"\n## {method}, {policy}\n",
        "| N | shards | backend | weights | gradients | master | moments | all | said | sent | said | of Ψ |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, backend in itertools.product(cases, BACKENDS):
        cells = [str(case.devices), case.shards, backend]
        if case not in found[backend]:
            lines.append("| " + " | ".join([*cells, *["refused"] * 9]) + " |")
            continue
        measured, resolved = found[backend][case], case.recipe(recipe)
        cost = cost_of(resolve(resolved), BACKENDS[backend])
        held, sent = cost.held(), cost.moved().total
        psi = sum(local_size(p, resolved.plan, over_fsdp=False) for p in cost.trained)
        psi *= width(COMPUTE_DTYPE[policy])
        parts = [measured[part] for part in ("weights", "gradients", "master", "moments")]
        cells += [_kib(size) for size in (*parts, sum(parts), held.total, measured["sent"], sent)]
        lines.append("| " + " | ".join([*cells, f"{measured['sent'] / psi:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f}"


if __name__ == "__main__":
    main()
