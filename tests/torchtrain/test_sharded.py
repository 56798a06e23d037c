"""Every plan gives the run of one process: in float64 to 1e-10, in float32 to its rounding, in bfloat16 closely."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_cases import (
    EVALUATED,
    EVALUATED_MORE,
    FEW,
    METHODS,
    MODELS,
    MORE,
    PRECISION,
    RESUMED,
    RESUMED_MORE,
    Case,
    Resumed,
    case,
)
from ranks import Command, distance, drift, furthest, run_all, traced
from safetensors.numpy import load_file
from small import ROOT, recipe_maker, write_checkpoint

from parity.plant import Edit
from trainspec.recipe import Recipe
from trainspec.trace import Trace

Make = Callable[..., Recipe]
PROOF = 1e-10  # of each tensor's largest entry; rounding stays near 1e-14
FP32_GRADIENT, FP32_LOSS = 1e-5, 3e-6
BF16_GRADIENT, BF16_LOSS = 0.04, 1e-3  # a few roundings to 8 bits, each 2⁻⁹
STEPS, LR = 5, 1e-3
RESUMED_UPDATE = 1e-3  # of the rate: what rounding of one gradient of five leaves of an update is 3e-5
HELDOUT = ROOT / "configs/data/qa-heldout.jsonl"


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
    "clipped by the norm of one process's part": (
        case("wide", "full", "fp32", tensor=2),
        Edit("torchtrain.zero", "return self._mesh.tensor.group", "return self._mesh.replicas.group"),
        "moment1",
    ),
    "norm of one group of weights": (
        case("wide", "full", "fp32", fsdp=2, shards="params"),
        Edit("torchtrain.zero", "math.hypot(*norms)", "norms[-1]"),
        "grad_norm",
    ),
    "masters from rounded weights": (
        case("wide", "full", "bf16", fsdp=2, shards="gradients"),
        Edit("torchtrain.step", 'if policy == "bf16":', 'if policy == "never":'),
        "initial",
    ),
}  # fmt: skip


# The same for what is restored: of the first or the last of RESUMED.
PLANTED_RESUMED = {
    "moments not restored": (
        RESUMED[1],
        Edit("torchtrain.step", '("moment1", checkpoint.moment1),', ""),
    ),
    "updates not counted": (
        RESUMED[1],
        Edit("torchtrain.step", "set_steps(state.optimizer, checkpoint.step)", "pass"),
    ),
    "masters rounded": (
        RESUMED[2],
        Edit(
            "torchtrain.zero",
            "utils.safe_set_local_fp32_param(parameter, part)",
            "utils.safe_set_local_fp32_param(parameter, part.bfloat16().float())",
        ),
    ),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("models")
    dirs = {name: write_checkpoint(root / name, spec) for name, spec in MODELS.items()}
    return recipe_maker(dirs, tmp_path_factory.mktemp("cache"))


def recipe_of(make: Make, case: Case, **run: Any) -> Recipe:
    return make(
        case.model,
        method=METHODS[case.method],
        precision=PRECISION[case.precision],
        plan=dict(case.plan),
        batch={"global_examples": 24, "accumulation": 2},
        data={"sequence_tokens": 96, "too_long": "cut"},
        optimizer={"lr": LR, "weight_decay": 0.1, "clip_norm": 0.5},
        run={"steps": STEPS} | run,
    )


def stopped_and_resumed(make: Make, resumed: Resumed, out: Path, *edits: Edit) -> list[Command]:
    return [
        Command("train", recipe_of(make, resumed.first, stop_after_steps=STEPS - 1), out),
        Command("train", recipe_of(make, resumed.second), out, ("--resume",), edits),
    ]


def evaluated(make: Make, case: Case, out: Path) -> list[Command]:
    """Held-out losses, behind an update and of the checkpoint."""
    recipe = recipe_of(make, case, steps=1)
    heldout = recipe.data.model_copy(update={"heldout": str(HELDOUT)})
    recipe = recipe.model_copy(update={"data": heldout})
    return [Command("train", recipe, out), Command("eval", recipe, out)]


def run_cases(
    make: Make, home: Path, cases: list[Case], resumed: list[Resumed], evaluate: list[Case]
) -> Path:
    """One launch for each number of processes."""
    commands: dict[int, list[Command]] = {}

    def add(case: Case, *some: Command) -> None:
        commands.setdefault(case.processes, []).extend(some)

    for c in dict.fromkeys([*(c.alone for c in cases), *cases]):
        add(c, traced(recipe_of(make, c), place(home, c)))
    for r in resumed:
        add(r.first, *stopped_and_resumed(make, r, home / str(r)))
    for c in [*(c.alone for c in evaluate), *evaluate]:
        add(c, *evaluated(make, c, place(home, c) / "evaluated"))
    for processes, some in commands.items():
        run_all(some, home / f"launch-{processes}", processes=processes)
    return home


@pytest.fixture(scope="module")
def few(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("few"), FEW, RESUMED, EVALUATED)


@pytest.fixture(scope="module")
def more(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("more"), MORE, RESUMED_MORE, EVALUATED_MORE)


def place(home: Path, case: Case) -> Path:
    return home / str(case)


def traces(home: Path, case: Case) -> tuple[Path, Path]:
    return place(home, case.alone) / "trace", place(home, case) / "trace"


def check(left: Path, right: Path, precision: str) -> None:
    losses = drift(left, right, "loss", steps=STEPS)
    bound = {"fp64": PROOF, "fp32": FP32_GRADIENT}.get(precision, BF16_GRADIENT)
    assert furthest(left, right, "gradient", step=1) <= bound
    assert drift(left, right, "grad_norm", steps=1) <= bound
    assert furthest(left, right, "moment1", step=1) <= bound  # of clipped gradients
    if precision == "fp64":
        assert losses <= PROOF
        assert drift(left, right, "grad_norm", steps=STEPS) <= PROOF
        for step in range(1, STEPS + 1):
            for group in ("gradient", "update", "moment1", "moment2"):
                assert furthest(left, right, group, step=step) <= PROOF, (group, step)
        assert furthest(left, right, "activation", step=1) <= PROOF
        assert furthest(left, right, "activation_gradient", step=1) <= PROOF
    elif precision == "fp32":
        assert furthest(left, right, "activation_gradient", step=1) <= FP32_GRADIENT
        assert losses <= FP32_LOSS
    else:
        assert losses <= BF16_LOSS
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


def check_resumed(home: Path, resumed: Resumed, out: Path) -> None:
    last = f"checkpoints/step-{STEPS:06d}"
    unbroken = place(home, resumed.first) / "run" / last
    left, right = (
        {part: load_file(folder / f"{part}.safetensors") for part in ("weights", "moment1", "moment2")}
        for folder in (unbroken, out / last)
    )
    is_proof = resumed.first.precision == "fp64"
    for part in ("moment1", "moment2"):
        assert distance(left[part], right[part]) <= (PROOF if is_proof else FP32_GRADIENT), part
    moved = [np.abs(left["weights"][name] - array).max() for name, array in right["weights"].items()]
    assert np.max(moved) <= (PROOF if is_proof else RESUMED_UPDATE) * LR


@pytest.mark.parametrize("resumed", RESUMED, ids=str)
def test_a_run_goes_on_under_another_plan(few: Path, resumed: Resumed):
    check_resumed(few, resumed, few / str(resumed))


@pytest.mark.full
@pytest.mark.parametrize("resumed", RESUMED_MORE, ids=str)
def test_larger_runs_go_on_under_another_plan(more: Path, resumed: Resumed):
    check_resumed(more, resumed, more / str(resumed))


def check_evaluated(home: Path, case: Case) -> None:
    """Behind an update and from the checkpoint, under the plan and alone, all say the same."""
    said = []
    for each in (case.alone, case):
        out = place(home, each) / "evaluated"
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        words = (out / "said.txt").read_text().split()
        assert words[:2] == ["held-out", "loss"]
        said += [rows[-1]["heldout_loss"], float(words[2])]
    assert np.ptp(said) <= FP32_LOSS * np.mean(said)
    assert abs(rows[-1]["loss"] - said[0]) > 100 * FP32_LOSS * said[0]  # control: of other rows


@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_heldout_loss_under_a_plan_is_that_of_one_process(few: Path, case: Case):
    check_evaluated(few, case)


@pytest.mark.full
@pytest.mark.parametrize("case", EVALUATED_MORE, ids=str)
def test_heldout_loss_of_split_layers_is_that_of_one_process(more: Path, case: Case):
    check_evaluated(more, case)


def test_a_number_that_is_none_is_never_close():
    """Negative control of the measures themselves."""
    one = {"a": np.ones(3), "b": np.ones(3)}
    assert distance(one, one) == 0
    for name, left in itertools.product(one, (True, False)):
        other = one | {name: np.array([1, np.nan, 1])}
        assert not distance(*((other, one) if left else (one, other))) <= 1


def test_masters_of_a_bfloat16_run_are_not_rounded(few: Path):
    trace = Trace(traces(few, FEW[-1])[1])
    weight = trace.read_initial("weight/model.layers.0.self_attn.q_proj.weight")
    assert weight.dtype == np.float32
    assert (weight.view(np.uint32) & 0xFFFF).any()  # bits that bfloat16 has not


@pytest.fixture(scope="module")
def planted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    commands = [traced(recipe_of(make, case), home / name, edit) for name, (case, edit, _) in PLANTED.items()]
    for name, (resumed, edit) in PLANTED_RESUMED.items():
        commands += stopped_and_resumed(make, resumed, home / name, edit)
    run_all(commands, home / "launch", processes=2)
    return home


@pytest.mark.full
@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_is_seen(few: Path, planted: Path, fault: str):
    """Negative control: the same comparisons, with one line of the product changed."""
    case, _, group = PLANTED[fault]
    left, right = traces(few, case)[0], planted / fault / "trace"
    if group == "initial":
        names = Trace(left).initial_names()
        assert any((Trace(left).read_initial(n) != Trace(right).read_initial(n)).any() for n in names)
        return
    if group == "grad_norm":
        assert drift(left, right, group, steps=1) > 1e-3
    else:
        assert furthest(left, right, group, step=1) > 1e-3
    with pytest.raises(AssertionError):
        check(left, right, case.precision)


@pytest.mark.full
@pytest.mark.parametrize("fault", PLANTED_RESUMED)
def test_a_mistake_in_what_is_restored_is_seen(few: Path, planted: Path, fault: str):
    with pytest.raises(AssertionError):
        check_resumed(few, PLANTED_RESUMED[fault][0], planted / fault)
