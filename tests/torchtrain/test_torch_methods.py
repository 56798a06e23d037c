"""Every method under every kind of plan is the run of one process, leaves the same adapter, and trains nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import probe_methods
import pytest
import torch
from method_sections import ADDED
from plan_cases import METHODS, MODELS, Case, case
from plan_runs import (
    APART,
    DORA_BF16_GRADIENT,
    DORA_FP32_ACTIVATION,
    Make,
    check,
    drawn_adapter,
    recipe_of,
    run_cases,
    traces,
)
from ranks import Command, furthest, run, run_all, traced
from torch import nn

from parity.runs.edit import Edit
from torchtrain.cluster import finish, start
from torchtrain.dropout import keep_mask
from torchtrain.step import State, init_state, train_step
from torchtrain.weights import canonical_name
from trainspec.data import Batch, open_dataset
from trainspec.methods import trainable_table
from trainspec.recipe import Recipe
from trainspec.rng import name_key
from trainspec.runs.run import resolve

_THREE_D = {"pipe": 2, "fsdp": 2, "tensor": 2, "shards": "optimizer", "microbatches": 3}


def in_turns(methods: Sequence[str], *kinds: dict[str, Any]) -> list[Case]:
    """A case of each method, of the kinds in turns: settings of `case`, the rest of which is the plan."""
    return [
        case(plan.pop("model"), method, plan.pop("precision"), **plan)
        for method, plan in zip(methods, map(dict, itertools.cycle(kinds)), strict=False)
    ]


# By the number of processes: one launch each. What is covered is in the docstring of the test.
TWO = [
    *in_turns(ADDED, {"model": "tied", "precision": "fp64", "tensor": 2}),
    *in_turns(
        ADDED,
        {
            "model": "wide",
            "precision": "fp32",
            "packing": True,
            "fsdp": 2,
            "shards": "params",
            "remat": "full",
        },
        {"model": "wide", "precision": "bf16", "fsdp": 2, "shards": "optimizer"},
        {"model": "wide", "precision": "fp32", "fsdp": 2, "shards": "gradients"},
        {"model": "wide", "precision": "bf16", "fsdp": 2, "shards": "params"},
    ),
    *in_turns(("adapter", "prefix-projection"), {"model": "tied", "precision": "bf16-bf16", "tensor": 2}),
]
PIPES = in_turns(
    (*ADDED, "lora-first"),
    {"model": "wide", "precision": "bf16", "pipe": 2, "microbatches": 4},
    {"model": "wide", "precision": "fp32", "pipe": 2, "microbatches": 4},
    {
        "model": "deep-tied",
        "precision": "fp32",
        "packing": True,
        "pipe": 2,
        "microbatches": 3,
        "remat": "full",
    },
    {"model": "wide", "precision": "bf16-bf16", "pipe": 2, "microbatches": 4},
)
FOUR = in_turns(
    (*ADDED, "lora-first"),
    {"model": "wide", "precision": "fp32", "fsdp": 2, "tensor": 2, "shards": "params"},
    {"model": "tied", "precision": "fp64", "packing": True, "data": 2, "tensor": 2, "remat": "full"},
    {"model": "deep", "precision": "fp32", "pipe": 2, "fsdp": 2, "shards": "optimizer", "microbatches": 3},
    {"model": "deep", "precision": "bf16", "pipe": 2, "tensor": 2, "microbatches": 3, "remat": "full"},
    {"model": "deep", "precision": "fp32", "pipe": 4, "microbatches": 2},
)
EIGHT = in_turns(("dora", "prefix-projection"), {"model": "deep", "precision": "fp32", **_THREE_D})
LAUNCHES = {"two": TWO, "pipes": PIPES, "four": FOUR, "eight": EIGHT}

# A mistake each, and the phase in which the comparison must see it.
PLANTED = {
    "each stage with the gradient of its own layers": (
        case("wide", "prefix-projection", "fp32", pipe=2, microbatches=4),
        Edit("torchtrain.engines.pipeline:PipelineEngine._reduce_shared", "__stages.sum_(__gradient)", "None"),
        "gradient",
    ),
    "weights of every stage counted by each": (
        case("wide", "prefix-projection", "fp32", pipe=2, microbatches=4),
        Edit("torchtrain.engines.pipeline:PipelineEngine.__init__", "__mesh.stages.index > 0", "False"),
        "moment1",
    ),
    "each peer with the gradient of its own heads": (
        case("wide", "prefix", "fp32", tensor=2),
        Edit("torchtrain.tensor_parallel:own_shard", "_Copy.apply(__x, __peers)", "__x"),
        "gradient",
    ),
    "an adapter's output summed over the peers": (
        case("wide", "adapter", "fp32", tensor=2),
        Edit("torchtrain.methods.bottleneck:Bottleneck.forward", "__h + self.up(__x)", "__h + 2 * self.up(__x)"),
        "activation",
    ),
    "the LSTM's mask is that of an example of the batch": (
        case("wide", "ptuning-lstm", "fp32", data=2),
        Edit("torchtrain.dropout:CounterDropout.forward", "__x.new_zeros(__examples, dtype=torch.int32)", "self._point.rows[:1]"),
        "gradient",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the runs of a launch are; each is made when its first test asks for it."""
    homes: dict[str, Path] = {}

    def home(launch: str) -> Path:
        if launch not in homes:
            homes[launch] = run_cases(make, tmp_path_factory.mktemp(launch), LAUNCHES[launch], [], [])
        return homes[launch]

    return home


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize(("launch", "case"), [(n, c) for n, some in LAUNCHES.items() for c in some], ids=str)
def test_a_method_is_the_run_of_one_process(launched: Callable[[str], Path], launch: str, case: Case):
    """Every method once as split layers, as split weights, over stages, and over four processes; the plans take turns.

    `parity matrix` holds every method under every plan to JAX (tests/parity/test_matrix.py); here are also what it has
    not: packing, recomputation and sums in bfloat16 together with these.
    """
    bounds = (
        {"bf16": DORA_BF16_GRADIENT, "fp32_activation": DORA_FP32_ACTIVATION} if case.method == "dora" else {}
    )
    check(*traces(launched(launch), case), case.precision, **bounds)


@pytest.fixture(scope="module")
def planted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = run_cases(
        make, tmp_path_factory.mktemp("planted"), [c.alone for c, _, _ in PLANTED.values()], [], []
    )
    commands = [traced(recipe_of(make, case), home / name, edit) for name, (case, edit, _) in PLANTED.items()]
    run_all(commands, home / "launch", processes=2)
    return home


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_is_seen(planted: Path, fault: str):
    """Negative control: the same comparisons, with one line of the product changed."""
    case, _, group = PLANTED[fault]
    left, right = traces(planted, case)[0], planted / fault / "trace"
    assert furthest(left, right, group, step=1) > 1e-2
    with pytest.raises(AssertionError, match=APART):
        check(left, right, case.precision)


# Saved under these from the same weights: the rate of the first update is zero. Each method on one process, and under two
# of the three others, which take turns.
SAVED: tuple[dict[str, Any], ...] = (
    {"fsdp": 2, "shards": "params"},
    {"tensor": 2},
    {"pipe": 2, "microbatches": 3},
)


@pytest.fixture(scope="module")
def saved(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of each method the adapters that the plans leave, that of one process first, and the one they started from last."""
    home = tmp_path_factory.mktemp("saved")
    commands: dict[int, list[Command]] = {1: [], 2: []}
    adapters: dict[str, list[Path]] = {}
    for number, method in enumerate(ADDED):
        for plan in ({}, SAVED[number % 3], SAVED[(number + 1) % 3]):
            recipe = recipe_of(make, case("wide", method, "fp32", **plan), steps=1)
            warm = recipe.schedule.model_copy(update={"warmup_steps": 1})
            recipe = recipe.model_copy(update={"schedule": warm})
            out = home / method / f"{len(adapters.setdefault(method, []))}"
            some = [Command("train", recipe, out), Command("export", recipe, out)]
            commands[recipe.plan.devices] += some
            adapters[method].append(out / "adapter")
        adapters[method].append(drawn_adapter(recipe_of(make, case("wide", method, "fp32")), MODELS["wide"]))
    for processes, some in commands.items():
        run_all(some, home / f"launch-{processes}", processes=processes)
    return adapters


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize("method", ADDED)
def test_an_adapter_has_the_same_bytes_under_every_plan(saved: dict[str, list[Path]], method: str):
    *exported, start = ({f.name: f.read_bytes() for f in d.iterdir()} for d in saved[method])
    assert "adapter_model.safetensors" in start
    assert {name: exported[0][name] for name in start} == start  # an export has the tokenizer's files, too
    for other in exported:
        assert other == exported[0]


# Every method where weights are split, and of each way to train one where layers are.
_PROBED: dict[str, tuple[str, dict[str, Any]]] = {
    "params": ("fp32", {"fsdp": 2, "shards": "params"}),
    "gradients": ("bf16", {"fsdp": 2, "shards": "gradients"}),
    "pipe": ("bf16", {"pipe": 2, "microbatches": 4}),
}
PROBED = [
    *zip(ADDED, itertools.cycle(("params", "gradients")), strict=False),
    *((method, "pipe") for method in ("dora", "prompt", "ptuning-lstm", "prefix-projection")),
]


@pytest.fixture(scope="module")
def probed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Recipe, Any]]:
    home = tmp_path_factory.mktemp("probed")
    recipes = {}
    for method, name in PROBED:
        precision, plan = _PROBED[name]
        recipes[method, name] = recipe_of(make, case("wide", method, precision, **plan))
    files = []
    for i, recipe in enumerate(recipes.values()):
        files.append(str(home / f"{i}.yaml"))
        Path(files[-1]).write_text(recipe.to_yaml())
    run(Path(probe_methods.__file__), files, home, processes=2)
    results = json.loads((home / "results.json").read_text())
    return {key: (recipes[key], result) for key, result in zip(recipes, results, strict=True)}


@pytest.mark.full(minutes=2)
@pytest.mark.parametrize(("method", "plan"), PROBED)
def test_a_process_holds_state_of_what_is_trained_only(probed: Any, method: str, plan: str):
    recipe, result = probed[method, plan]
    table = trainable_table(MODELS["wide"], recipe.method)
    processes = recipe.plan.devices
    assert result["frozen"] == [[]] * processes
    assert result["alike"] == [True] * processes
    # Split flat, with padding; stages that all hold an encoder hold it whole.
    copies = processes if plan == "pipe" and method.startswith("prefix") else 1
    padding = processes * (2 * len(table) + 8)
    assert 0 <= sum(result["moments"]) - copies * sum(p.size for p in table) <= padding


@contextmanager
def prepared(recipe: Recipe) -> Iterator[tuple[State, Batch]]:
    start(recipe)
    try:
        state = init_state(resolve(recipe))
        yield state, open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    finally:
        finish()


@pytest.mark.parametrize("method", ["lora", *ADDED])
def test_nothing_frozen_has_a_gradient_or_moments(make: Make, method: str):
    recipe = recipe_of(make, case("tied", method, "fp64"))
    names = {p.name for p in trainable_table(MODELS["tied"], recipe.method)}
    with prepared(recipe) as (state, batch):
        parameters = {canonical_name(name): p for name, p in state.model.named_parameters()}
        update, seen = state.engine.step, set()

        def look() -> None:
            seen.update(name for name, p in parameters.items() if p.grad is not None)
            update()

        with patch.object(state.engine, "step", look):
            train_step(state, batch, lr=1e-3)
        held = set(state.optimizer.state)
    assert seen == names
    assert held == {parameters[name] for name in names}
    assert names < set(parameters)


def test_the_lstm_drops_by_the_shared_mask(make: Make):
    """Against two of torch's own layers, with the mask of update 3 between them; off in evaluation."""
    recipe = recipe_of(make, case("wide", "ptuning-lstm", "fp64"))
    sizes = METHODS["ptuning-lstm"]
    nv, hidden, rate = sizes["virtual_tokens"], sizes["hidden"], sizes["dropout"]
    with prepared(recipe) as (state, _):
        lstm: Any = state.model.get_submodule("prompt_encoder.lstm_head")
        layers = [
            nn.LSTM(lstm.input_size, hidden, bidirectional=True, batch_first=True).double() for _ in "01"
        ]
        layers[1] = nn.LSTM(2 * hidden, hidden, bidirectional=True, batch_first=True).double()
        for i, layer in enumerate(layers):
            for name, weight in layer.named_parameters():
                weight.data = getattr(lstm, name.replace("_l0", f"_l{i}")).detach()
        x = torch.randn(1, nv, lstm.input_size, dtype=torch.float64)
        state.point.step, state.point.rows = 3, torch.tensor([5, 6])  # the rows of a batch do not count
        key = name_key(recipe.run.seed, "dropout", "prompt_encoder.lstm_head")
        keep = keep_mask(key, step=3, rows=torch.zeros(1), sequence_tokens=nv, features=2 * hidden, rate=rate)
        assert 0 < (~keep).sum() < keep.numel()
        inner = layers[0](x)[0]
        dropped = layers[1](torch.where(keep, inner / (1 - rate), 0.0))[0]
        torch.testing.assert_close(lstm.train()(x)[0], dropped, rtol=0, atol=1e-14)
        torch.testing.assert_close(lstm.eval()(x)[0], layers[1](inner)[0], rtol=0, atol=1e-14)
