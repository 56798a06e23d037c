"""`parity matrix`: models, methods, batches, plans and precisions as data; every cell is run and judged, or unsupported.

If one backend refuses a plan, its run on one device is compared with the other backend's run of the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from parity.comparison.compare import Comparison, Finding, compare
from parity.comparison.drift import lora_scale
from parity.comparison.pair import Pair
from parity.diff import bounds_for
from parity.report.verdict import explained
from parity.runs.fixture import (
    FAMILIES,
    METHODS,
    OF_FAMILIES,
    VARIANTS,
    TinySetup,
    method_of,
    write_tiny,
)
from parity.runs.launch_many import CaseResult, run_cases, training
from parity.runs.plans import refusal, runs_as
from trainspec.backends import BACKENDS
from trainspec.errors import TraceError, UserError
from trainspec.plans.plan import Backend, Plan, Policy
from trainspec.recipe import Precision, Recipe
from trainspec.trace import Trace

Fields = Mapping[str, Any]

_PACKED: Fields = {"packing": True, "sequence_tokens": 64}
# Enough for four replicas to have an example each in both accumulation slices.
GLOBAL_EXAMPLES = 8
# How examples are filled and accumulated: sections `data` and `batch` of a recipe.
BATCHES: dict[str, tuple[Fields, Fields]] = {
    "packed-2": (_PACKED, {"accumulation": 2}),
    "packed-1": (_PACKED, {"accumulation": 1}),
    "packed-4": (_PACKED, {"accumulation": 4}),
    "right-2": ({"padding_side": "right"}, {"accumulation": 2}),
    "left-2": ({"padding_side": "left"}, {"accumulation": 2}),
}
PLANS: dict[str, Plan] = {
    "one-device": Plan(),
    "remat": Plan(remat="full"),
    "data-2": Plan(data=2),
    "zero1-2": Plan(fsdp=2, shards="optimizer"),
    "zero2-2": Plan(fsdp=2, shards="gradients"),
    "zero3-2": Plan(fsdp=2, shards="params"),
    "tensor-2": Plan(tensor=2),
    "data-2-tensor-2": Plan(data=2, tensor=2),
    "zero1-2-tensor-2": Plan(fsdp=2, tensor=2, shards="optimizer"),
    "zero2-2-tensor-2": Plan(fsdp=2, tensor=2, shards="gradients"),
    "zero3-2-tensor-2": Plan(fsdp=2, tensor=2, shards="params"),
    "data-2-zero3-2-tensor-2": Plan(data=2, fsdp=2, tensor=2, shards="params"),
    "zero1-4-tensor-2": Plan(fsdp=4, tensor=2, shards="optimizer"),
    "pipe-2": Plan(pipe=2, microbatches=2),
    "pipe-2-data-2-tensor-2": Plan(pipe=2, data=2, tensor=2, microbatches=2),
    "pipe-2-zero1-2-tensor-2": Plan(pipe=2, fsdp=2, tensor=2, shards="optimizer", microbatches=2),
    "pipe-4-zero1-2": Plan(pipe=4, fsdp=2, shards="optimizer", microbatches=4),
    "pipe-4-zero3-2-gpipe": Plan(pipe=4, fsdp=2, shards="params", microbatches=4, schedule="gpipe"),
    "pipe-2-data-2-interleaved": Plan(pipe=2, data=2, microbatches=2, schedule="interleaved"),
}
# Model and batch of each pipeline. Two layers make two stages; four stages, or two of two model chunks each, need the model
# of five layers. With four microbatches and two replicas there is one example for each, without accumulation.
PIPELINES: dict[str, tuple[str, str]] = {
    "pipe-2": ("plain", "packed-2"),
    "pipe-2-data-2-tensor-2": ("plain", "packed-2"),
    "pipe-2-zero1-2-tensor-2": ("plain", "packed-2"),
    "pipe-4-zero1-2": ("deep", "packed-1"),
    "pipe-4-zero3-2-gpipe": ("deep", "packed-1"),
    "pipe-2-data-2-interleaved": ("deep", "packed-2"),
}
# The plans on which every method is run in bf16: replicated, split as a weight, as a layer, and over stages.
COARSE = ("zero2-2", "zero3-2", "tensor-2", "pipe-2-zero1-2-tensor-2")
# What is run of each family: whole weights and adapters, and virtual tokens as rows and as keys and values; on one device,
# sharded as a weight, split as a layer, over stages, and all three at once.
FAMILY_METHODS = ("full", "lora", "prompt", "prefix")
FAMILY_PLANS = ("one-device", "zero3-2", "tensor-2", "pipe-2", "pipe-2-zero1-2-tensor-2")
# The same of a method that one family alone has: split in each way on both backends, and at both ends in bf16.
ONE_FAMILY_PLANS = (
    *(("one-device", "fp64"), ("tensor-2", "fp64"), ("zero3-2", "fp32"), ("pipe-2", "fp32")),
    *(("one-device", "bf16"), ("pipe-2-zero1-2-tensor-2", "bf16")),
)
# bf16 with its usual sums in float32, and with sums in bfloat16: DeepSpeed's default, and what XLA does where weights are
# cast before use.
PRECISIONS: dict[str, Precision] = {
    "fp64": Precision(policy="fp64", reduce="fp64"),
    "fp32": Precision(policy="fp32", reduce="fp32"),
    "bf16": Precision(policy="bf16", reduce="fp32"),
    "bf16-sums": Precision(policy="bf16", reduce="bf16"),
}
STEPS = 5


@dataclass(frozen=True)
class Cell:
    """One recipe that both backends must train alike; every field is a key of a table in this package."""

    model: str
    method: str
    batch: str
    plan: str
    precision: str

    @property
    def policy(self) -> Policy:
        """The precision policy, without the type of sums."""
        return PRECISIONS[self.precision].policy

    def __str__(self) -> str:
        return "/".join((self.model, self.method, self.batch, self.plan, self.precision))

    def recipe(self, tiny: TinySetup, backend: Backend) -> Recipe:
        """What a backend trains: five updates with warm-up, clipping and decay."""
        data, batch = BATCHES[self.batch]
        return tiny.recipe(
            self.model,
            method=tiny.method(self.method, model=self.model),
            data=data,
            batch={"global_examples": GLOBAL_EXAMPLES, **batch},
            plan=runs_as(PLANS[self.plan], self.policy, backend).model_dump(),
            precision=PRECISIONS[self.precision].model_dump(),
            optimizer={"lr": 3e-3},
            schedule={"kind": "cosine", "warmup_steps": 2},
            run={"stop_after_steps": STEPS},
        )


@dataclass(frozen=True)
class CellResult:
    """The result of a cell. `shown` is the finding that uses most of its bound or, if the cell fails, the first divergence.

    `unproven` gradients and updates agree, and rounding reaches so far that this says nothing. `refused` has the
    sentence of each backend that refuses the plan; it ran on one device, unless both refuse.
    """

    cell: Cell
    verdict: Literal["pass", "fail", "unsupported"]
    shown: Finding | None = None
    undetermined: float = 0.0
    reason: str | None = None
    unproven: int = 0
    refused: Mapping[Backend, str] = field(default_factory=dict)


def cells() -> list[Cell]:
    """Every cell: all methods on all plans, models and batches, in the precisions that show something new.

    What all methods share (models, batches, how weights are split) is run in every precision with full training and LoRA.
    The other methods are proven in fp64, in fp32 on one device and wherever torch has no fp64 (that is where DeepSpeed
    works), and in bf16 on one device and the plans of `COARSE`. Families other than Llama: `family_cells`.
    """
    base, plain = "packed-2", "plain"
    proofs, usual = ("fp64", "fp32"), ("fp64", "fp32", "bf16")
    shared, others = ("full", "lora"), [name for name in METHODS if name not in ("full", "lora")]
    models = [name for name in VARIANTS if name != "deep"]  # that one is for the pipelines
    matrix = [Cell(m, a, base, "one-device", p) for m, a, p in itertools.product(models, shared, usual)]
    matrix += [Cell(plain, a, base, "one-device", p) for a, p in itertools.product(others, usual)]
    matrix += [Cell(m, a, base, "one-device", "fp64") for m in models if m != plain for a in others]
    for name in BATCHES:
        if name != base:
            matrix += [Cell(plain, a, name, "one-device", p) for a, p in itertools.product(shared, proofs)]
            matrix += [Cell(plain, a, name, "one-device", "fp64") for a in others]
    for name in PLANS:
        if name != "one-device":
            model, batch = PIPELINES.get(name, (plain, base))
            matrix += [Cell(model, a, batch, name, p) for a, p in itertools.product(shared, usual)]
            matrix += [Cell(model, a, batch, name, p) for a, p in itertools.product(others, _telling(name))]
    # What tensor parallelism splits in a special way: tied embeddings, and biases of both kinds.
    for variant in ("tied", "bias"):
        matrix += [Cell(variant, a, base, "data-2-tensor-2", p) for a, p in itertools.product(shared, proofs)]
        matrix += [Cell(variant, a, base, "zero3-2-tensor-2", "fp32") for a in METHODS]
    tied_stages = "pipe-2-zero1-2-tensor-2"  # the first and the last stage share the embedding
    matrix += [Cell("tied", a, base, tied_stages, p) for a, p in itertools.product(shared, proofs)]
    summed = ("one-device", "zero1-2", "zero3-2", "tensor-2", "zero3-2-tensor-2")
    return [*matrix, *(Cell(plain, a, base, p, "bf16-sums") for p in summed for a in shared)]


def family_cells() -> list[Cell]:
    """Every other family in fp64; in fp32 where torch has no fp64, and in bf16 at both ends, with full training and LoRA.

    ChatGLM2's layers are a GLM's: only its files differ, so that fp64 says it all, and what it alone has: `OF_FAMILIES`.
    """
    proofs = [
        Cell(f, a, "packed-2", p, "fp64")
        for f, p, a in itertools.product(FAMILIES, FAMILY_PLANS, FAMILY_METHODS)
    ]
    coarse = [(p, "fp32") for p in FAMILY_PLANS if refusal(PLANS[p], "fp64", "torch")]
    coarse += [(p, "bf16") for p in (FAMILY_PLANS[0], FAMILY_PLANS[-1])]
    others = [name for name in FAMILIES if name != "chatglm2"]
    rounded = [
        Cell(f, a, "packed-2", plan, p)
        for f, (plan, p), a in itertools.product(others, coarse, ("full", "lora"))
    ]
    own = [
        Cell(family, name, "packed-2", plan, p)
        for family, some in OF_FAMILIES.items()
        for name, (plan, p) in itertools.product(some, ONE_FAMILY_PLANS)
    ]
    return [*proofs, *rounded, *own]


def _telling(plan: str) -> list[str]:
    """The precisions in which the other methods are run on a plan, as the shared ones are run in all of them."""
    runs = {p: not any(refusal(PLANS[plan], PRECISIONS[p].policy, b) for b in BACKENDS) for p in PRECISIONS}
    precisions = ["fp64"]
    if runs["fp32"] and not runs["fp64"]:
        precisions.append("fp32")
    return [*precisions, "bf16"] if plan in COARSE else precisions


def refusals(cell: Cell) -> dict[Backend, str]:
    """The sentence of each backend that refuses the cell's plan."""
    lines: dict[Backend, str] = {}
    for backend in BACKENDS:
        if (line := refusal(PLANS[cell.plan], cell.policy, backend)) is not None:
            lines[backend] = line
    return lines


def run_matrix(chosen: Sequence[Cell], *, out: Path) -> list[CellResult]:
    """Train and judge every cell of `chosen` that at least one backend supports; one result per cell, in their order."""
    refused = {cell: refusals(cell) for cell in chosen}
    supported = [cell for cell in chosen if len(refused[cell]) < len(BACKENDS)]
    wrong = _train(supported, out) if supported else {}
    results = []
    for cell in chosen:
        if cell not in supported:
            result = CellResult(cell, "unsupported", reason=next(iter(refused[cell].values())))
        elif line := wrong.get(cell):
            result = CellResult(cell, "fail", reason=line)
        else:
            result = judge(cell, *(_home(out, backend, cell) / "trace" for backend in BACKENDS))
        results.append(replace(result, refused=refused[cell]))
    return results


def judge(cell: Cell, left: Path, right: Path) -> CellResult:
    """Compare the cell's two traces with the bounds of its precision."""
    try:
        pair = Pair(Trace(left), Trace(right))
        scale = lora_scale(method_of(cell.model, cell.method))
        return result_of(cell, compare(pair, bounds_for(pair, cell.policy, lora_scale=scale)))
    except TraceError as error:
        return CellResult(cell, "fail", reason=str(error))


def result_of(cell: Cell, comparison: Comparison) -> CellResult:
    """The result of a cell's comparison."""
    undetermined = comparison.undetermined
    if first := comparison.first_divergence:
        return CellResult(cell, "fail", first, undetermined, explained(first))
    worst = max(comparison.findings, key=lambda f: f.used)
    return CellResult(cell, "pass", worst, undetermined, unproven=len(comparison.unproven))


def _train(supported: Sequence[Cell], out: Path) -> dict[Cell, str]:
    """Write every cell's traces under `out`; returns the error of each cell that a backend did not finish.

    Both backends run at the same time.
    """
    tiny = write_tiny(out / "tiny")

    def train(backend: Backend) -> list[CaseResult]:
        cases = []
        for cell in supported:
            home = _home(out, backend, cell)
            recipe = cell.recipe(tiny, backend)
            cases.append(training(home / "recipe.yaml", home, devices=recipe.plan.devices))
            home.mkdir(parents=True)
            (home / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return run_cases(backend, cases, home=out / "launches")

    with ThreadPoolExecutor() as pool:
        by_backend = list(pool.map(train, BACKENDS))
    wrong: dict[Cell, str] = {}
    for backend, results in zip(BACKENDS, by_backend, strict=True):
        for cell, result in zip(supported, results, strict=True):
            if result.wrong is not None:
                wrong.setdefault(cell, f"{backend}: {result.wrong}")
    return wrong


def _home(out: Path, backend: Backend, cell: Cell) -> Path:
    return out / backend / str(cell).replace("/", "-")


def select(only: str | None, *, families: bool = False) -> list[Cell]:
    """The cells of Llama or those of the other `families` whose name contains `only`. Raises UserError if there is none."""
    every = family_cells() if families else cells()
    chosen = [cell for cell in every if only is None or only in str(cell)]
    if not chosen:
        raise UserError(f"--only {only}: no cell has that in its name; names are such as {every[0]}")
    return chosen
