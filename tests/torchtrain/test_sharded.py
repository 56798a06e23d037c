"""Every plan gives the run of one process: in float64 to 1e-10, in float32 to its rounding, in bfloat16 closely."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import furthest, losses, train_all
from small import SMALL, recipe_maker, write_checkpoint

from parity.plant import Edit
from trainspec.recipe import Recipe
from trainspec.trace import Trace

Make = Callable[..., Recipe]
PROOF = 1e-10  # of each tensor's largest entry; rounding stays near 1e-14
FP32_GRADIENT, FP32_LOSS = 1e-5, 3e-6
BF16_GRADIENT, BF16_LOSS = 0.04, 1e-3  # a few roundings to 8 bits, each 2⁻⁹
STEPS = 5

MODELS = {
    "wide": replace(SMALL, name="wide", kv_heads=4),
    "tied": replace(SMALL, name="tied", tied_embeddings=True, attention_bias=True, mlp_bias=True),
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {
        "kind": "lora",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "targets": ["q_proj", "v_proj", "o_proj", "down_proj"],
    },
    "lora-head": {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["lm_head", "k_proj"]},
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

    def __str__(self) -> str:
        return "-".join((self.model, self.method, self.precision, *(f"{k}-{v}" for k, v in self.plan)))

    @property
    def alone(self) -> Case:
        return replace(self, plan=())

    @property
    def processes(self) -> int:
        sizes = [value for _, value in self.plan if isinstance(value, int)]
        return int(np.prod(sizes))


def case(model: str, method: str, precision: str, **plan: Any) -> Case:
    return Case(model, method, precision, tuple(plan.items()))


SHARDS = ("optimizer", "gradients", "params")
FEW = [
    case("wide", "full", "fp64", tensor=2),
    case("tied", "lora", "fp64", tensor=2, remat="full"),
    case("tied", "full", "fp64", data=2),
    case("wide", "full", "fp32", fsdp=2, shards="params"),
    case("tied", "lora", "fp32", fsdp=2, shards="optimizer"),
    case("wide", "full", "bf16", fsdp=2, shards="gradients"),
]
_OTHERS = [
    *(case(m, k, "fp64", **p) for m, k in (("wide", "full"), ("tied", "lora"), ("wide", "lora-head"))
      for p in ({"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2, "remat": "full"})),
    *(case("wide", k, "fp64", tensor=4) for k in ("full", "lora-head")),
    *(case(m, k, "fp32", **p) for m, k in (("wide", "full"), ("tied", "lora")) for p in (
        {"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2}, {"tensor": 4} if m == "wide" else {"data": 4},
        *({"fsdp": 2, "shards": s} for s in SHARDS), *({"fsdp": 4, "shards": s} for s in SHARDS),
        *({"data": 2, "fsdp": 2, "shards": s} for s in SHARDS),
        *({"fsdp": 2, "tensor": 2, "shards": s, "remat": "full"} for s in SHARDS))),
    *(case(m, k, r, **p) for m, k in (("wide", "full"), ("tied", "lora")) for r in ("bf16", "bf16-bf16") for p in (
        {"tensor": 2}, *({"fsdp": 2, "shards": s} for s in SHARDS),
        *({"fsdp": 2, "tensor": 2, "shards": s} for s in SHARDS))),
    # 3 divides neither a weight nor the flat buffers: everything is padded.
    *(case(m, k, r, fsdp=3, shards=s) for m, k in (("wide", "full"), ("tied", "lora")) for r in ("fp32", "bf16")
      for s in SHARDS),
    case("wide", "full", "fp64", data=4, tensor=2),
    *(case("tied", "lora", "fp32", data=2, fsdp=2, tensor=2, shards=s) for s in SHARDS),
]  # fmt: skip
MORE = [c for c in dict.fromkeys(_OTHERS) if c not in FEW]

# A mistake each, in two processes, and the phase in which the comparison must see it.
PLANTED = {
    "gradient of a block's input not summed": (
        case("wide", "full", "fp64", tensor=2),
        Edit("torchtrain.tensor", "return ctx.peers.sum_(grads[0].clone(", "return (grads[0].clone("),
        "gradient",
    ),
    "dropout mask of the wrong features": (
        case("tied", "lora", "fp64", tensor=2, remat="full"),
        Edit("torchtrain.dropout", "torch.arange(first_feature, first_feature + features", "torch.arange(features"),
        "gradient",
    ),
    "replicas not summed": (
        case("tied", "full", "fp64", data=2),
        Edit("torchtrain.parallel", "self._mesh.replicas.sum_(parameter.grad)", "pass"),
        "gradient",
    ),
    "norm of whole tensors counted twice": (
        case("wide", "full", "fp64", tensor=2),
        Edit("torchtrain.parallel", "(squares + global_norm(whole)", "(squares + 2 * global_norm(whole)"),
        "moment1",
    ),
    "mean over replicas not undone": (
        case("wide", "full", "fp32", fsdp=2, shards="params"),
        Edit("torchtrain.zero", "self.loss_scale = float(recipe.plan.replicas)", "self.loss_scale = 1.0"),
        "gradient",
    ),
    "masters from rounded weights": (
        case("wide", "full", "bf16", fsdp=2, shards="gradients"),
        Edit("torchtrain.step", 'if policy == "bf16":', 'if policy == "never":'),
        "initial",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("models")
    dirs = {name: write_checkpoint(root / name, spec) for name, spec in MODELS.items()}
    return recipe_maker(dirs, tmp_path_factory.mktemp("cache"))


def recipe_of(make: Make, case: Case) -> Recipe:
    return make(
        case.model,
        method=METHODS[case.method],
        precision=PRECISION[case.precision],
        plan=dict(case.plan),
        batch={"global_examples": 24, "accumulation": 2},
        data={"sequence_tokens": 96, "too_long": "cut"},
        optimizer={"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        run={"steps": STEPS},
    )


def train_cases(make: Make, cases: list[Case], home: Path) -> Path:
    """One launch for each number of processes."""
    alone = {str(c.alone): c.alone for c in cases}
    by_processes = itertools.groupby(
        sorted([*alone.values(), *cases], key=lambda c: c.processes), key=lambda c: c.processes
    )
    for processes, some in by_processes:
        recipes = {str(c): recipe_of(make, c) for c in some}
        train_all(recipes, home / str(processes), processes=processes)
    return home


@pytest.fixture(scope="module")
def few(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_cases(make, FEW, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def more(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_cases(make, MORE, tmp_path_factory.mktemp("more"))


def traces(home: Path, case: Case) -> tuple[Path, Path]:
    return home / "1" / str(case.alone) / "trace", home / str(case.processes) / str(case) / "trace"


def check(left: Path, right: Path, precision: str) -> None:
    drift = np.abs(np.array(losses(left)) / np.array(losses(right)) - 1).max()
    if precision == "fp64":
        assert drift <= PROOF
        for step in range(1, STEPS + 1):
            for group in ("gradient", "update", "moment1", "moment2"):
                assert furthest(left, right, group, step=step) <= PROOF, (group, step)
        assert furthest(left, right, "activation", step=1) <= PROOF
        assert furthest(left, right, "activation_gradient", step=1) <= PROOF
    elif precision == "fp32":
        assert furthest(left, right, "gradient", step=1) <= FP32_GRADIENT
        assert furthest(left, right, "activation_gradient", step=1) <= FP32_GRADIENT
        assert drift <= FP32_LOSS
    else:
        assert furthest(left, right, "gradient", step=1) <= BF16_GRADIENT
        assert drift <= BF16_LOSS
        one, other = Trace(left), Trace(right)
        assert one.initial_names() == other.initial_names()
        for name in one.initial_names():  # masters are what the file says, not what bfloat16 makes of it
            np.testing.assert_array_equal(one.read_initial(name), other.read_initial(name))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_plan_is_the_run_of_one_process(few: Path, case: Case):
    check(*traces(few, case), case.precision)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_plan_is_the_run_of_one_process(more: Path, case: Case):
    check(*traces(more, case), case.precision)


def test_masters_of_a_bfloat16_run_are_not_rounded(few: Path):
    trace = Trace(traces(few, FEW[-1])[1])
    weight = trace.read_initial("weight/model.layers.0.self_attn.q_proj.weight")
    assert weight.dtype == np.float32
    assert (weight.view(np.uint32) & 0xFFFF).any()  # bits that bfloat16 has not


@pytest.fixture(scope="module")
def planted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    names = {f"{i}": key for i, key in enumerate(PLANTED)}
    train_all(
        {name: recipe_of(make, PLANTED[key][0]) for name, key in names.items()},
        home,
        processes=2,
        edits={name: PLANTED[key][1] for name, key in names.items()},
    )
    return home


@pytest.mark.full
@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_is_seen(few: Path, planted: Path, fault: str):
    """Negative control: the same comparisons, with one line of the product changed."""
    case, _, group = PLANTED[fault]
    left, right = traces(few, case)[0], planted / str(list(PLANTED).index(fault)) / "trace"
    if group == "initial":
        names = Trace(left).initial_names()
        assert any((Trace(left).read_initial(n) != Trace(right).read_initial(n)).any() for n in names)
        return
    assert furthest(left, right, group, step=1) > 1e-3
    with pytest.raises(AssertionError):
        check(left, right, case.precision)
