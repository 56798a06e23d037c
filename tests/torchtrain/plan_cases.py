"""The plans that test_sharded.py and test_pipeline.py run: what is trained, in which precision, over which devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from method_sections import sections
from small import SMALL

from trainspec.plans.plan import Plan

MODELS = {
    "wide": replace(SMALL, name="wide", kv_heads=4),
    "tied": replace(SMALL, name="tied", tied_embeddings=True, attention_bias=True, mlp_bias=True),
    # Norms of heads are whole on every tensor peer, which sees its own heads only.
    "qwen3": replace(SMALL, name="qwen3", family="qwen3"),
    # Uneven stages: three and two layers, or two, one, one, one.
    "deep": replace(SMALL, name="deep", layers=5, kv_heads=4),
    "deep-tied": replace(SMALL, name="deep-tied", layers=5, tied_embeddings=True, attention_bias=True),
}
METHODS: dict[str, dict[str, Any]] = sections(
    {
        "lora": {"targets": ["q_proj", "v_proj", "o_proj", "down_proj"]},
        "dora": {"targets": ["q_proj", "v_proj", "o_proj", "down_proj"]},
        "adapter": {"bottleneck": 5},
        "ptuning-mlp": {"hidden": 7},
        "ptuning-lstm": {"virtual_tokens": 4, "hidden": 6, "dropout": 0.2},
        "prefix-projection": {"hidden": 5},
    }
) | {
    "lora-head": {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["lm_head", "k_proj"]},
    "only-head": {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["lm_head"]},
    # Nothing in the later stages of a pipeline.
    "lora-first": {
        "kind": "lora",
        "rank": 3,
        "alpha": 5.0,
        "rslora": True,
        "targets": r"model\.layers\.0\..*",
    },
}
PRECISION = {
    "fp64": {"policy": "fp64", "reduce": "fp64"},
    "fp32": {"policy": "fp32", "reduce": "fp32"},
    "bf16": {"policy": "bf16", "reduce": "fp32"},
    "bf16-bf16": {"policy": "bf16", "reduce": "bf16"},
}


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    precision: str
    plan: tuple[tuple[str, Any], ...] = ()
    packing: bool = False

    def __str__(self) -> str:
        packed = ("packed",) if self.packing else ()
        return "-".join(
            (self.model, self.method, self.precision, *packed, *(f"{k}-{v}" for k, v in self.plan))
        )

    @property
    def alone(self) -> Case:
        return replace(self, plan=())

    @property
    def processes(self) -> int:
        return Plan(**dict(self.plan)).devices


def case(model: str, method: str, precision: str, *, packing: bool = False, **plan: Any) -> Case:
    return Case(model, method, precision, tuple(plan.items()), packing)


FEW = [
    case("wide", "full", "fp64", tensor=2),
    case("tied", "lora", "fp64", tensor=2, remat="full"),
    case("tied", "full", "fp64", data=2),
    case("wide", "full", "fp32", fsdp=2, shards="params"),
    case("wide", "full", "bf16", fsdp=2, shards="gradients"),
    case("qwen3", "full", "fp64", tensor=2),
]
# What two processes show of full training and LoRA, and every larger plan once: models, methods, precisions and what is
# split take turns. `parity matrix` holds both methods under each of its plans, in every precision, to JAX.
MORE = [
    case("wide", "lora-head", "fp64", tensor=2),
    case("tied", "lora", "fp32", fsdp=2, shards="optimizer"),
    case("wide", "full", "bf16-bf16", fsdp=2, shards="optimizer"),
    case("tied", "lora", "bf16", fsdp=2, shards="gradients"),
    case("tied", "lora", "bf16-bf16", fsdp=2, shards="params"),
    case("tied", "lora", "bf16-bf16", tensor=2),
    # 3 divides neither a weight nor the flat buffers: everything is padded.
    case("tied", "lora", "fp32", fsdp=3, shards="optimizer"),
    case("wide", "full", "bf16", fsdp=3, shards="gradients"),
    case("wide", "full", "fp32", fsdp=3, shards="params"),
    case("wide", "full", "fp64", tensor=4),
    case("wide", "lora-head", "fp64", tensor=4),
    case("tied", "lora", "fp64", data=2, tensor=2, remat="full"),
    case("tied", "lora", "fp32", data=4),
    case("tied", "lora", "fp32", fsdp=4, shards="params"),
    case("wide", "full", "fp32", data=2, fsdp=2, shards="params"),
    case("tied", "lora", "fp32", data=2, fsdp=2, shards="gradients"),
    case("wide", "full", "bf16", fsdp=2, tensor=2, shards="gradients"),
    case("wide", "full", "fp32", fsdp=2, tensor=2, shards="params", remat="full"),
    case("tied", "lora", "bf16-bf16", fsdp=2, tensor=2, shards="optimizer"),
    case("tied", "lora", "fp32", data=2, fsdp=2, tensor=2, shards="params"),
]
# Of the other methods: a prefix under recomputation and split weights, which PEFT's own refuses.
FEW_VIRTUAL = [
    case("wide", "prefix-projection", "fp32", packing=True, fsdp=2, shards="params", remat="full"),
]


@dataclass(frozen=True)
class Resumed:
    """A run that stops a step before its end under one plan, and makes the last one under another.

    The last step's moments hold what was restored and one new gradient, and no update before them differs: what
    rounding does to an update of noise (Adam makes a whole one of it) stays out of the comparison.
    """

    first: Case
    second: Case

    def __str__(self) -> str:
        return f"{self.first}-then-{self.second}"


RESUMED = [
    Resumed(FEW[1], case("tied", "lora", "fp64", data=2)),
    Resumed(FEW[3], case("wide", "full", "fp32", tensor=2)),
    # The same examples on the same process: equal gradients, so that only the masters can differ.
    Resumed(FEW[4], case("wide", "full", "bf16", fsdp=2, shards="params")),
]
RESUMED_MORE = [
    Resumed(
        case("wide", "full", "fp32", data=2, fsdp=2, shards="params"),
        case("wide", "full", "fp32", fsdp=2, tensor=2, shards="optimizer"),
    ),
    Resumed(
        case("wide", "full", "bf16", fsdp=2, tensor=2, shards="gradients"),
        case("wide", "full", "bf16", fsdp=2, tensor=2, shards="params"),
    ),
    # Parts with padding.
    Resumed(
        case("tied", "lora", "fp32", fsdp=3, shards="optimizer"),
        case("tied", "lora", "fp32", fsdp=3, shards="params"),
    ),
]
EVALUATED = [FEW[3]]
EVALUATED_MORE = [case("wide", "full", "fp32", fsdp=2, tensor=2, shards="params")]

PIPES = [
    case("wide", "full", "fp32", pipe=2, microbatches=4),
    case("deep-tied", "lora", "fp32", pipe=2, microbatches=6, remat="full"),
    case("deep-tied", "full", "bf16", pipe=2, microbatches=4),
]
# A stage that trains nothing, and weights that every stage has, one of them without an embedding.
PIPES_VIRTUAL = [
    case("deep-tied", "ptuning-lstm", "fp32", pipe=2, microbatches=4),
    case("wide", "prefix", "bf16", pipe=2, microbatches=4),
]
_THREE_D = {"pipe": 2, "fsdp": 2, "tensor": 2, "shards": "optimizer"}
# Every larger plan once, as above. The methods are in test_torch_methods.py, under pipelines as well.
PIPES_MORE = [
    *(case("deep-tied", "full", p, pipe=2, microbatches=4) for p in ("fp32", "bf16-bf16")),
    case("wide", "lora-head", "fp32", pipe=2, microbatches=4),
    case("deep-tied", "full", "fp32", pipe=2, microbatches=1),
    case("deep-tied", "prefix-projection", "fp32", pipe=2, microbatches=2),
    case("deep-tied", "lora", "fp32", pipe=4, microbatches=6, remat="full"),
    case("deep-tied", "full", "bf16-bf16", pipe=4, microbatches=4),
    case("deep", "full", "fp32", pipe=2, tensor=2, microbatches=4),
    case("deep-tied", "full", "fp32", pipe=2, fsdp=2, shards="optimizer", microbatches=3),
    case("tied", "full", "bf16", **_THREE_D, microbatches=3, remat="full"),
    case("deep", "lora-head", "fp32", **_THREE_D, microbatches=2, remat="full"),
]
PIPES_RESUMED = [
    Resumed(PIPES[0], case("wide", "full", "fp32", tensor=2)),
    # The same microbatches: equal gradients, so that only the masters can differ.
    Resumed(PIPES[2], PIPES[2]),
]
PIPES_RESUMED_MORE = [
    Resumed(PIPES_MORE[-1], case("deep", "lora-head", "fp32", pipe=4, tensor=2, microbatches=3)),
    Resumed(
        case("deep-tied", "full", "fp32", pipe=2, fsdp=2, shards="optimizer", microbatches=3),
        case("deep-tied", "full", "fp32", fsdp=4, shards="params"),
    ),
]
PIPES_EVALUATED = [PIPES[0]]


def marked(cases: Sequence[Case | Resumed], fast: Sequence[Case | Resumed]) -> list[Any]:
    """Parameters of a test: those that are not `fast` are left to the long set."""
    return [pytest.param(c, id=str(c), marks=[] if c in fast else pytest.mark.full(minutes=3)) for c in cases]
