"""Every process saves what it holds, once and without asking the others; whatever plan saved it, every plan restores its bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import probe_memory
import probe_shards
import pytest
import torch
from numpy.typing import NDArray
from plan_cases import METHODS, MODELS, PRECISION, Case, case
from plan_runs import Make
from ranks import run
from small import VARIANTS, recipe_maker, write_checkpoint, write_tokenizer
from torch import nn
from whole_arrays import save_checkpoint

from parity.runs.edit import Edit
from parity.runs.launch_many import Case as Launched
from parity.runs.launch_many import run_cases
from torchtrain.mesh import Peers
from torchtrain.precision import to_numpy
from torchtrain.weights import Elements, from_canonical, shards
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.files.model_config import config_of
from trainspec.params import Normal, Param
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

# GLM's matrix of gate and up is split in both of its halves; Qwen3's norms of heads are whole on every tensor peer.
FUSED = {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["gate_up_proj", "k_proj"]}
SECTIONS = METHODS | {"full": {"kind": "full"}, "lora-fused": FUSED}
_THREE_D = {"pipe": 2, "fsdp": 2, "tensor": 2, "shards": "optimizer", "microbatches": 2}
# By the number of processes, in the order in which they are launched: the first case of a model, method and stored type
# restores a checkpoint of random numbers that one process wrote, every other what the one before it has saved.
LAUNCHES = {
    8: [
        case("deep-tied", "full", "bf16", **_THREE_D),
        case("deep-tied", "lora", "fp32", **_THREE_D),
    ],
    4: [
        case("deep-tied", "full", "bf16", fsdp=4, shards="params"),
        case("deep-tied", "full", "fp32", data=2, fsdp=2, shards="optimizer"),
        case("deep-tied", "full", "bf16-bf16", fsdp=2, tensor=2, shards="gradients"),
        case("deep-tied", "full", "fp32", pipe=4, microbatches=2),
        # Biases of five elements: the last of four shards is empty.
        case("deep-tied", "adapter", "fp32", fsdp=4, shards="params"),
        case("deep-tied", "lora", "fp32", fsdp=2, tensor=2, shards="params"),
        case("deep-tied", "prefix-projection", "bf16", pipe=2, tensor=2, microbatches=2),
        case("glm", "full", "fp64", data=2, tensor=2),
        case("glm", "lora-fused", "fp32", fsdp=2, tensor=2, shards="optimizer"),
    ],
    2: [
        case("deep-tied", "full", "bf16", fsdp=2, shards="optimizer"),
        case("deep-tied", "full", "fp32", fsdp=2, shards="params"),
        case("deep-tied", "full", "bf16-bf16", fsdp=2, shards="gradients"),
        case("deep-tied", "full", "bf16", fsdp=2, shards="params"),
        case("deep-tied", "full", "fp32", data=2),
        case("deep-tied", "full", "bf16", pipe=2, microbatches=2),
        case("deep-tied", "full", "fp32", tensor=2),
        case("deep-tied", "adapter", "bf16", fsdp=2, shards="gradients"),
        case("deep-tied", "lora", "fp32", fsdp=2, shards="optimizer"),
        case("deep-tied", "lora", "bf16", tensor=2),
        case("deep-tied", "prefix-projection", "fp32", pipe=2, microbatches=2),
        case("deep-tied", "prefix-projection", "fp32", fsdp=2, shards="params"),
        case("glm", "full", "fp64", tensor=2),
        case("glm", "full", "bf16", tensor=2),
        case("glm", "lora-fused", "bf16", tensor=2),
        case("glm", "lora-fused", "fp32", fsdp=2, shards="params"),
        case("qwen3", "full", "fp32", tensor=2),
    ],
    1: [
        case("deep-tied", "full", "bf16"),
        case("deep-tied", "full", "fp32"),
        case("deep-tied", "adapter", "fp32"),
        case("deep-tied", "lora", "bf16"),
        case("deep-tied", "prefix-projection", "fp32"),
        case("glm", "full", "fp64"),
        case("glm", "full", "fp32"),
        case("glm", "lora-fused", "bf16"),
        case("qwen3", "full", "bf16"),
    ],
}  # fmt: skip
CASES = [c for some in LAUNCHES.values() for c in some]
SPECS = {"deep-tied": MODELS["deep-tied"], "glm": VARIANTS["glm"], "qwen3": VARIANTS["qwen3"]}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("models")
    return recipe_maker({name: write_checkpoint(root / name, spec) for name, spec in SPECS.items()})


def recipe_of(make: Make, case: Case) -> Recipe:
    return make(
        case.model,
        method=SECTIONS[case.method],
        precision=PRECISION[case.precision],
        plan=dict(case.plan),
        batch={"global_examples": 8, "accumulation": 1},
        data={"sequence_tokens": 96, "too_long": "cut"},
        optimizer={"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        checkpoint={"keep": 1},
    )


def random_checkpoint(recipe: Recipe, out: Path) -> Path:
    """Weights and moments of which no two elements are the same, after three updates."""
    generator = np.random.default_rng(0)
    dtype = np.float64 if recipe.precision.policy == "fp64" else np.float32

    def drawn(scale: float) -> dict[str, Any]:
        return {
            p.name: (scale * generator.uniform(0.5, 1.5, p.shape)).astype(dtype)
            for p in resolve(recipe).trained
        }

    return save_checkpoint(out, Checkpoint(3, drawn(0.05), drawn(1e-4), drawn(1e-6)), recipe=recipe)


@pytest.fixture(scope="module")
def probed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """What was found of each case: one launch for each number of processes."""
    home, found = tmp_path_factory.mktemp("shards"), {}
    sources: dict[tuple[str, str, bool], Path] = {}
    for processes, cases in LAUNCHES.items():
        entries = []
        for c in cases:
            recipe, out = recipe_of(make, c), home / str(c)
            file, chain = home / f"{c}.yaml", (c.model, c.method, c.precision == "fp64")
            file.write_text(recipe.to_yaml())
            source = sources.get(chain) or random_checkpoint(recipe, home / "-".join(map(str, chain)))
            step = int(source.name.partition("-")[2])
            entries.append({"recipe": str(file), "source": str(source), "out": str(out)})
            sources[chain] = out / "checkpoints" / f"step-{step + 1:06d}"
        launch = home / f"launch-{processes}"
        run(Path(probe_shards.__file__), entries, launch, processes=processes)
        found |= dict(zip(cases, json.loads((launch / "results.json").read_text()), strict=True))
    return found


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_saved_is_restored_to_the_bit(probed: dict[Case, dict[str, Any]], case: Case):
    found = probed[case]
    assert found["restored"] == []
    assert found["computed"] == []
    assert found["saved"] == []
    assert found["restored again"] == []
    assert found["resumed"] == []


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in CASES if c.processes > 1], ids=str)
def test_nothing_is_sent_while_it_is_saved(probed: dict[Case, dict[str, Any]], case: Case):
    found, plan = probed[case], dict(case.plan)
    assert found["sent"] == [[]] * case.processes
    if plan.keys() != {"data"}:  # control: to have it whole the processes send it
        assert all(found["gathered"])


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in CASES if c.processes > 1], ids=str)
def test_every_process_saves_its_share(probed: dict[Case, dict[str, Any]], make: Make, case: Case):
    sizes = probed[case]["bytes"]
    itemsize = 8 if case.precision == "fp64" else 4
    total = 3 * itemsize * sum(p.size for p in resolve(recipe_of(make, case)).trained)
    assert sum(sizes) == total
    assert probed[case]["room"] == sizes
    if not {"pipe", "tensor"} & dict(case.plan).keys():
        # DeepSpeed pads flat buffers and shards; a tensor of a few rows has a few rows more on one replica.
        assert max(sizes) <= 1.15 * total / case.processes


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_process_reads_what_it_holds(probed: dict[Case, dict[str, Any]], make: Make, case: Case):
    found, plan = probed[case], dict(case.plan)
    shards, is_flat = plan.get("shards", "nothing"), "pipe" in plan or case.precision.startswith("bf16")
    if {"pipe", "tensor"} & plan.keys():
        return
    itemsize = 8 if case.precision == "fp64" else 4
    whole = itemsize * sum(p.size for p in resolve(recipe_of(make, case)).trained)
    for kind in probe_shards.KINDS:
        read = [each[kind] for each in found["read"]]
        is_split = shards == "params" or (kind != "weights" and (shards != "nothing" or is_flat))
        assert sum(read) == whole * (1 if is_split else case.processes), kind
        assert max(read) <= 1.15 * whole / case.processes or not is_split, kind


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_exchange_texts(probed: dict[Case, dict[str, Any]], case: Case):
    assert probed[case]["texts"] == []


FLAT = case("deep-tied", "lora", "bf16", fsdp=2, shards="optimizer")
# What is found of each mistake: a part of what `probe_shards.probe` gives, and what is in it.
PLANTED = {
    "moments swapped": (FLAT, "saved", "moment1/"),
    "halves of a matrix not told apart": (case("glm", "lora-fused", "fp32", tensor=2), "restored", "gate_up_proj.lora_B"),
    "only master weights restored": (FLAT, "computed", "weights/"),
    "processes wait for each other": (FLAT, "sent", "allreduce"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    home, entries = tmp_path_factory.mktemp("planted"), []
    for mistake, (c, *_) in PLANTED.items():
        recipe, file = recipe_of(make, c), home / f"{mistake}.yaml"
        file.write_text(recipe.to_yaml())
        source = random_checkpoint(recipe, home / f"{mistake} source")
        entry = {"recipe": str(file), "source": str(source), "out": str(home / mistake), "mistake": mistake}
        entries.append(entry)
    run(Path(probe_shards.__file__), entries, home / "launch", processes=2)
    return dict(zip(PLANTED, json.loads((home / "launch/results.json").read_text()), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_seen(planted: dict[str, dict[str, Any]], mistake: str):
    """Negative control of the tests above."""
    _, where, what = PLANTED[mistake]
    assert what in str(planted[mistake][where])


@pytest.mark.full
def test_a_shard_that_is_left_out_is_noticed(make: Make, tmp_path: Path):
    """Negative control: the second replica keeps the last norm's weight to itself."""
    recipe = recipe_of(make, case("deep-tied", "full", "fp32", fsdp=2, shards="optimizer"))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 1})}).to_yaml())
    left_out = Edit(
        "torchtrain.step:_saved",
        "_saves(__state, __param)",
        '__it and (__param.name != "model.norm.weight" or __state.mesh.replicas.index == 0)',
    )
    cases = [
        Launched(("train", str(file), "--out", str(tmp_path / name)), 2, edits)
        for name, edits in (("whole", ()), ("partial", (left_out,)))
    ]
    whole, partial = run_cases("torch", cases, home=tmp_path / "launch")
    assert whole.wrong is None, whole.said
    assert (tmp_path / "whole/checkpoints/step-000001/weights-00001-of-00002.safetensors").is_file()
    assert partial.code == 2
    assert "no process has written weights of model.norm.weight; no checkpoint was written" in partial.said
    assert not list((tmp_path / "partial/checkpoints").iterdir())


# What follows needs no processes. Sizes that 4 peers and 3 replicas do or do not divide, and every kind of split.
PARAMS = [
    Param("two halves", (24, 5), ("gate_up", "embed"), Normal(1.0), True, "linear"),
    Param("a vector of two halves", (24,), ("gate_up",), Normal(1.0), False, "norm"),
    Param("rows", (8, 6), ("heads", "embed"), Normal(1.0), True, "linear"),
    Param("columns", (3, 8), ("embed", "mlp"), Normal(1.0), True, "linear"),
    Param("whole", (7,), ("embed",), Normal(1.0), False, "norm"),
]


def shard_of(param: Param, array: NDArray[Any], peer: int, size: int) -> NDArray[Any]:
    """A peer's shard of an array, by numpy's own cuts."""
    for dim, axis in enumerate(param.axes):
        if axis == "gate_up":
            halves = np.split(array, 2, dim)
            return np.concatenate([np.split(half, size, dim)[peer] for half in halves], dim)
        if axis in ("heads", "mlp"):
            return np.split(array, size, dim)[peer]
    return array


def read_stretches(
    param: Param, array: NDArray[Any], peers: Peers, cuts: Sequence[int]
) -> list[NDArray[Any]]:
    """What `from_canonical` reads of a peer's shard from cut to cut."""
    found: list[NDArray[Any]] = []

    def write(_: nn.Parameter, elements: Elements) -> None:
        found.extend(to_numpy(elements(first, end)) for first, end in pairwise(cuts))

    native = {param.name: nn.Parameter(torch.zeros(1))}
    from_canonical([(param, array)], native, tensor=peers, write=write)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("param", PARAMS, ids=lambda p: p.name)
def test_stretches_of_shards_are_boxes_of_the_whole(param: Param, size: int):
    array = np.arange(np.prod(param.shape), dtype=np.float64).reshape(param.shape)
    found, times = np.full(param.shape, -1.0), np.zeros(param.shape, int)
    for index in range(size):
        peers, shard = Peers(None, index, size), shard_of(param, array, index, size)
        cuts = [0, 1, shard.size // 3, shard.size // 3, shard.size - 2, shard.size]
        stretches = read_stretches(param, array, peers, cuts)
        np.testing.assert_array_equal(np.concatenate(stretches), shard.reshape(-1))
        if index and shard.shape == array.shape:  # the first peer saves what all of them have
            continue
        for first, elements in zip(cuts, stretches, strict=False):
            for saved in shards("moment1", param, first, elements, tensor=peers):
                assert (saved.name, saved.shape) == (param.name, param.shape)
                found[saved.index] = saved.array
                times[saved.index] += 1
    np.testing.assert_array_equal(found, array)
    assert (times == 1).all()


# No tensor has more than 2 % of the state, whose 0.3 GB are much more than the processes take for themselves.
LARGE = replace(VARIANTS["plain"], name="large", vocab=1024, embed=512, heads=8, kv_heads=4, head_dim=64, mlp=1536, layers=8)  # fmt: skip
LARGEST_TENSOR = 4 * 512 * 1536
OVERHEAD_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], dict[str, list[int]]]:
    """By the number of processes, and whether everything is gathered: what `probe_memory` found."""
    home, found = tmp_path_factory.mktemp("memory"), {}
    model = home / "large"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config_of(LARGE)))
    write_tokenizer(model)
    for processes in (1, 2, 4):
        plan = {"fsdp": processes, "shards": "params"} if processes > 1 else {}
        recipe = recipe_maker({"large": model})("large", method={"kind": "full"}, plan=plan)
        random = recipe.model.model_copy(update={"weights": "random"})
        file = home / f"{processes}.yaml"
        file.write_text(recipe.model_copy(update={"model": random}).to_yaml())
        kinds = [False, True] if processes == 4 else [False]
        entries = [
            {"recipe": str(file), "out": str(home / f"out-{processes}-{gathers}"), "gathers": gathers}
            for gathers in kinds
        ]
        run(Path(probe_memory.__file__), entries, home / f"launch-{processes}", processes=processes)
        results = json.loads((home / f"launch-{processes}/results.json").read_text())
        found |= {(processes, gathers): one for gathers, one in zip(kinds, results, strict=True)}
    return found


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_process_takes_memory_for_its_share_only(measured, processes: int):
    """A save copies the share, the next one into the same memory; a load reads into what is there already, a tensor at a time."""
    found = measured[processes, False]
    for share, save, again, load in zip(*(found[k] for k in ("share", "save", "again", "load")), strict=True):
        assert 0.8 * share < save <= 1.2 * share + LARGEST_TENSOR + OVERHEAD_BYTES
        assert again <= 0.2 * share + LARGEST_TENSOR + OVERHEAD_BYTES
        assert load <= 0.2 * share + LARGEST_TENSOR + OVERHEAD_BYTES


@pytest.mark.full
def test_gathering_takes_memory_for_everything(measured):
    """Negative control."""
    found = measured[4, True]
    assert max(found["save"]) > 2 * max(found["share"]) + OVERHEAD_BYTES
