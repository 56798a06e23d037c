"""Every plan gives the run of one process: in float64 to 1e-10, in float32 to its rounding, in bfloat16 closely."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from plan_cases import (
    EVALUATED,
    EVALUATED_MORE,
    FEW,
    FEW_VIRTUAL,
    MORE,
    PIPES,
    RESUMED,
    RESUMED_MORE,
    Case,
    Resumed,
    case,
    marked,
)
from plan_runs import (
    APART,
    Make,
    check,
    check_evaluated,
    check_resumed,
    check_saved,
    recipe_of,
    run_cases,
    stopped_and_resumed,
    traces,
)
from ranks import distance, drift, furthest, run_all, traced

from parity.runs.edit import Edit
from trainspec.trace import Trace

# A mistake each, in two processes, and the phase in which the comparison must see it.
PLANTED = {
    "gradient of a block's input not summed": (
        case("wide", "full", "fp64", tensor=2),
        Edit("torchtrain.tensor_parallel:_Copy.backward", "__peers.sum_(__gradient)", "__gradient"),
        "gradient",
    ),
    "dropout mask of the wrong features": (
        case("tied", "lora", "fp64", tensor=2, remat="full"),
        Edit(
            "torchtrain.dropout:keep_mask",
            "torch.arange(__first, __first + __features, dtype=__dtype, device=__device)",
            "torch.arange(__features, dtype=__dtype, device=__device)",
        ),
        "gradient",
    ),
    "replicas not summed": (
        case("tied", "full", "fp64", data=2),
        Edit("torchtrain.engines.plain:PlainEngine.accumulate", "__mesh.replicas.sum_(__gradient)", "None"),
        "gradient",
    ),
    "norm of whole tensors counted twice": (
        case("wide", "full", "fp64", tensor=2),
        Edit("torchtrain.engines.plain:WholeStore.norm", "__split + __whole", "__split + 2 * __whole"),
        "moment1",
    ),
    "mean over replicas not undone": (
        case("wide", "full", "fp32", fsdp=2, shards="params"),
        Edit("torchtrain.engines.deepspeed:DeepSpeedEngine.__init__", "float(__plan.replicas)", "1.0"),
        "gradient",
    ),
    "clipped by the norm of one process's shard": (
        case("wide", "full", "fp32", tensor=2),
        Edit("torchtrain.engines.deepspeed:Mpu.get_model_parallel_group", "__mesh.tensor", "__mesh.replicas"),
        "moment1",
    ),
    "norm of one group of weights": (
        case("wide", "full", "fp32", fsdp=2, shards="params"),
        Edit("torchtrain.engines.deepspeed:ShardedStore.norm", "math.hypot(*__norms)", "__norms[-1]"),
        "grad_norm",
    ),
    "masters from rounded weights": (
        case("wide", "full", "bf16", fsdp=2, shards="gradients"),
        Edit("torchtrain.step:init_state", '__policy == "bf16"', "False"),
        "initial",
    ),
}  # fmt: skip


# The same for what is restored: of the first or the last of RESUMED.
PLANTED_RESUMED = {
    "moments not restored": (
        RESUMED[1],
        Edit(
            "torchtrain.step:restore",
            '(__weight, ("moment1", __moment1), __moment2)',
            "(__weight, __moment2)",
        ),
    ),
    "updates not counted": (
        RESUMED[1],
        Edit("torchtrain.step:restore", "set_steps(__optimizer, __steps)", "None"),
    ),
    "masters rounded": (
        RESUMED[2],
        Edit(
            "torchtrain.engines.deepspeed:ShardedStore.write",
            "__utils.safe_set_local_fp32_param(__parameter, __part)",
            "__utils.safe_set_local_fp32_param(__parameter, __part.bfloat16().float())",
        ),
    ),
}


# Of the fast tests: each precision, split layers, split weights, two pipelines, one of them tied, and one that goes on under
# another plan.
_PIPES = [PIPES[0], PIPES[2]]
_FAST = [FEW[3], FEW[4], FEW[5], *_PIPES]
FAST: list[Case | Resumed] = [*_FAST, RESUMED[1]]


@pytest.fixture(scope="module")
def few(make: Make, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if request.config.option.markexpr == "not full":
        return run_cases(make, tmp_path_factory.mktemp("few"), _FAST, [RESUMED[1]], [])
    cases = [*FEW, *FEW_VIRTUAL, *_PIPES]
    return run_cases(make, tmp_path_factory.mktemp("few"), cases, RESUMED, EVALUATED)


@pytest.fixture(scope="module")
def more(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(make, tmp_path_factory.mktemp("more"), MORE, RESUMED_MORE, EVALUATED_MORE)


@pytest.mark.parametrize("case", marked([*FEW, *FEW_VIRTUAL, *_PIPES], FAST))
def test_a_plan_is_the_run_of_one_process(few: Path, case: Case):
    check(*traces(few, case), case.precision)


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_plan_is_the_run_of_one_process(more: Path, case: Case):
    check(*traces(more, case), case.precision)


@pytest.mark.parametrize("case", marked([*FEW, *FEW_VIRTUAL], FAST))
def test_every_process_saves_its_shards(few: Path, case: Case):
    check_saved(few, case)


@pytest.mark.parametrize("resumed", marked(RESUMED, FAST))
def test_a_run_goes_on_under_another_plan(few: Path, resumed: Resumed):
    check_resumed(few, resumed, few / str(resumed))


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("resumed", RESUMED_MORE, ids=str)
def test_larger_runs_go_on_under_another_plan(more: Path, resumed: Resumed):
    check_resumed(more, resumed, more / str(resumed))


@pytest.mark.parametrize("case", marked(EVALUATED, []))
def test_heldout_loss_under_a_plan_is_that_of_one_process(few: Path, case: Case):
    check_evaluated(few, case)


@pytest.mark.full(minutes=3)
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
    trace = Trace(traces(few, FEW[4])[1])
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


@pytest.mark.full(minutes=3)
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
    with pytest.raises(AssertionError, match=APART):
        check(left, right, case.precision)


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("fault", PLANTED_RESUMED)
def test_a_mistake_in_what_is_restored_is_seen(few: Path, planted: Path, fault: str):
    with pytest.raises(AssertionError, match=r"restored (moment1|weights)"):
        check_resumed(few, PLANTED_RESUMED[fault][0], planted / fault)
