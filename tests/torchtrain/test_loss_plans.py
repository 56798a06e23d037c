"""The loss in chunks under plans: the gradients of one process without chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_cases import Case, case
from plan_runs import (
    BF16_GRADIENT,
    BF16_LOSS,
    FP32_GRADIENT,
    FP32_LOSS,
    PROOF,
    STEPS,
    Make,
    check_evaluated,
    directory_of,
    evaluated,
    recipe_of,
    traces,
)
from ranks import Command, drift, furthest, run_all

from parity.runs.edit import Edit

CHUNK = 7  # divides no row
CASES = [
    case("wide", "full", "fp64", tensor=2, loss_chunk=CHUNK),
    case("wide", "lora-head", "fp64", tensor=2, loss_chunk=CHUNK),
    case("tied", "full", "fp64", data=2, loss_chunk=CHUNK),
    case("wide", "ptuning-mlp", "fp64", data=2, loss_chunk=CHUNK),
    *(case(m, k, "fp32", fsdp=2, shards="params", loss_chunk=CHUNK) for m, k in (
        ("wide", "full"), ("tied", "full"), ("wide", "lora-head"), ("wide", "only-head"))),
    case("wide", "full", "bf16", fsdp=2, shards="gradients", loss_chunk=CHUNK),
    case("wide", "lora-head", "bf16", fsdp=2, shards="params", loss_chunk=CHUNK),
    case("deep-tied", "full", "fp32", pipe=2, microbatches=4, loss_chunk=CHUNK),
    case("deep", "lora-head", "fp32", pipe=2, microbatches=2, remat="full", loss_chunk=CHUNK),
    case("wide", "full", "bf16", pipe=2, microbatches=2, loss_chunk=CHUNK),
]  # fmt: skip
EVALUATED = [CASES[4], CASES[10]]
BOUNDS = {"fp64": (PROOF, PROOF), "fp32": (FP32_GRADIENT, FP32_LOSS), "bf16": (BF16_GRADIENT, BF16_LOSS)}
# Every chunk with the masks of a row's first positions.
WRONG_MASKS = Edit(
    "torchtrain.loss_chunks:HeadLoss.chunk_loss", "Stretch(__first, __count)", "Stretch(0, __count)"
)


def traced(make: Make, home: Path, case: Case, *edits: Edit) -> Command:
    """Without activations, which would be those of logits made all at once."""
    out = directory_of(home, case)
    return Command("train", recipe_of(make, case), out / "run", ("--trace", str(out / "trace")), edits)


@pytest.fixture(scope="module")
def home(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one process and one of two."""
    home = tmp_path_factory.mktemp("chunks")
    alone = [traced(make, home, c) for c in dict.fromkeys(c.alone for c in CASES)]
    alone += [
        command
        for c in EVALUATED
        for command in evaluated(make, c.alone, directory_of(home, c.alone) / "evaluated")
    ]
    both = [traced(make, home, c) for c in CASES]
    both += [
        command for c in EVALUATED for command in evaluated(make, c, directory_of(home, c) / "evaluated")
    ]
    both.append(traced(make, home / "wrong", CASES[1], WRONG_MASKS))
    run_all(alone, home / "launch-1", processes=1)
    run_all(both, home / "launch-2", processes=2)
    return home


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_under_a_plan_train_as_one_process_without(home: Path, case: Case):
    left, right = traces(home, case)
    gradient, loss = BOUNDS[case.precision]
    assert drift(left, right, "loss", steps=STEPS) <= loss
    for step in range(1, STEPS + 1 if case.precision == "fp64" else 2):
        assert furthest(left, right, "gradient", step=step) <= gradient, step
    assert drift(left, right, "grad_norm", steps=1) <= gradient


@pytest.mark.full
@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_held_out_losses_are_those_without_chunks(home: Path, case: Case):
    check_evaluated(home, case)


@pytest.mark.full
def test_masks_of_the_wrong_positions_would_show(home: Path):
    left, right = traces(home, CASES[1])[0], directory_of(home / "wrong", CASES[1]) / "trace"
    assert furthest(left, right, "gradient", step=1) > 1e-3
