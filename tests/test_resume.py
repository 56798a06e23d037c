"""A run survives a kill, and goes on: on its own backend bit by bit, on the other one within the proof's bound.

What it goes on with is known by content: files may move, other contents are refused or allowed and said.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many import run_many
from safetensors.numpy import load_file
from small import QA, ROOT, recipe_maker, write_tokenizer

from parity.check import check
from parity.runs.sides import parse_resumption, parse_side
from trainspec.checkpoints import folders
from trainspec.plans.plan import Policy
from trainspec.recipe import load_recipe

# Many, so that a kill behind the first checkpoint comes long before the end.
STEPS = 30
LAST = f"step-{STEPS:06d}"
PARTS = ("weights", "moment1", "moment2")


@pytest.fixture
def recipe_file(model_dirs, tmp_path: Path) -> Path:
    recipe = recipe_maker(model_dirs)(
        method={"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"},
        precision={"policy": "fp64", "reduce": "fp64"},
        schedule={"kind": "linear", "warmup_steps": 2},
        checkpoint={"every_steps": 2, "keep": 2},
        run={"steps": STEPS},
    )
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    return file


def ends(out: Path, last: str = LAST) -> dict[str, dict[str, np.ndarray]]:
    assert folders.latest(out) == out / "checkpoints" / last
    return {part: load_file(out / "checkpoints" / last / f"{part}.safetensors") for part in PARTS}


def run(program: str, scratch: Path, *argvs: list[str]) -> None:
    for argv, result in zip(argvs, run_many(program, list(argvs), scratch), strict=True):
        assert result["code"] == 0, f"{argv}: {result}"


@pytest.mark.parametrize("program", ["torchtrain", pytest.param("jaxtrain", marks=pytest.mark.full)])
def test_a_run_that_was_killed_goes_on_bit_by_bit(program: str, recipe_file: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(program, tmp_path / "a", ["train", str(recipe_file), "--out", str(whole)])
    command = [sys.executable, "-m", program, "train", str(recipe_file), "--out", str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while folders.latest(killed) is None and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    saved = folders.latest(killed)
    assert saved is not None
    assert saved.name != LAST, "it ended before it was killed: give it more steps"
    run(program, tmp_path / "b", ["train", str(recipe_file), "--out", str(killed), "--resume"])
    left, right = ends(whole), ends(killed)
    for part in PARTS:
        assert all(np.array_equal(array, right[part][name]) for name, array in left[part].items()), part
    assert [line.split(",")[0] for line in (killed / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {i}' for i in range(1, STEPS + 1)
    ]


# What a resumed run is held to: every method's kind of state, in every policy. The data are packed.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"},
    "full": {"kind": "full"},
    "prefix": {"kind": "prefix", "virtual_tokens": 3, "projection": True, "hidden": 16},
}
POLICIES = ("fp64", "fp32", "bf16")
HALF = 3


def written(home: Path, model_dirs: dict[str, Path], method: str, policy: str, **sections: Any) -> Path:
    """The recipe of a run of twice HALF updates, or of what `sections` say."""
    recipe = recipe_maker(model_dirs)(
        method=METHODS[method],
        data={"packing": True},
        batch={"accumulation": 2},
        precision={"policy": policy, "reduce": "fp64" if policy == "fp64" else "fp32"},
        schedule={"kind": "linear", "warmup_steps": 2},
        checkpoint={"every_steps": 10**6},
        **{"run": {"steps": 2 * HALF}} | sections,
    )
    file = home / f"{method}-{policy}.yaml"
    file.write_text(recipe.to_yaml())
    return file


def traced(file: Path, out: Path, trace: str, *words: str) -> list[str]:
    return ["train", str(file), "--out", str(out), "--trace", str(out / trace), *words]


@pytest.mark.full
@pytest.mark.parametrize("program", ["torchtrain", "jaxtrain"])
def test_a_run_in_two_parts_is_the_run_bit_by_bit(program: str, model_dirs, tmp_path: Path):
    """Batches, losses, gradients, updates, moments and the last checkpoint, byte for byte."""
    files = [written(tmp_path, model_dirs, method, policy) for method in METHODS for policy in POLICIES]
    stop, first, second = f"run.stop_after_steps={HALF}", [], []
    for file in files:
        whole, parts = tmp_path / file.stem / "whole", tmp_path / file.stem / "parts"
        first += [traced(file, whole, "trace"), traced(file, parts, "first", "--set", stop)]
        second.append(traced(file, parts, "second", "--resume"))
    run(program, tmp_path / "a", *first)
    run(program, tmp_path / "b", *second)
    differing = set()
    for file in files:
        whole, parts = tmp_path / file.stem / "whole", tmp_path / file.stem / "parts"
        lines = (whole / "trace/trace.jsonl").read_text().splitlines()
        assert (parts / "second/trace.jsonl").read_text().splitlines() == lines[HALF:], file.stem
        for step in range(HALF + 1, 2 * HALF + 1):
            name = f"step-{step:06d}.safetensors"
            assert (parts / "second" / name).read_bytes() == (whole / "trace" / name).read_bytes(), (
                file.stem,
                step,
            )
        last = f"step-{2 * HALF:06d}"
        left, right = ends(whole, last), ends(parts, last)
        for part in PARTS:
            assert left[part].keys() == right[part].keys()
            for tensor, array in left[part].items():
                assert np.array_equal(array, right[part][tensor]), (file.stem, part, tensor)
        differing.add((whole / "trace/trace.jsonl").read_text())
    assert len(differing) == len(files)  # control: no two cases are one


LONG = 20


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_on_the_other_framework(method: str, model_dirs, tmp_path: Path):
    """In float64, on two devices of each: torch has two processes, JAX two fake devices. Updates are compared, not weights."""
    plan = {"data": 2}
    file = written(tmp_path, model_dirs, method, "fp64", plan=plan, run={"steps": LONG})
    homes = {name: tmp_path / name for name in ("jax", "torch", "jax-torch", "torch-jax")}
    stop = ("--set", f"run.stop_after_steps={LONG // 2}")
    starts = {"jaxtrain": ("jax", "jax-torch"), "torchtrain": ("torch", "torch-jax")}
    for program, (whole, part) in starts.items():
        run(
            program,
            tmp_path / f"a-{program}",
            traced(file, homes[whole], "trace"),
            ["train", str(file), "--out", str(homes[part]), *stop],
        )
    for program, part in (("torchtrain", "jax-torch"), ("jaxtrain", "torch-jax")):
        run(program, tmp_path / f"b-{program}", traced(file, homes[part], "trace", "--resume"))
    for whole in ("jax", "torch"):
        for part in ("jax-torch", "torch-jax"):
            for step in range(LONG // 2 + 1, LONG + 1):
                name = f"trace/step-{step:06d}.safetensors"
                wanted, found = load_file(homes[whole] / name), load_file(homes[part] / name)
                assert wanted.keys() == found.keys()
                for key, array in wanted.items():
                    distance = np.abs(found[key].astype(np.float64) - array).max()
                    bound = 0 if key.startswith("batch/") else 1e-9
                    assert distance <= bound * np.abs(array).max(), (whole, part, step, key)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_from_zero3_to_fsdp_and_back(side: str, method: str, precision: Policy, model_dirs, tmp_path: Path):
    """One side makes all updates, the other the second half from the first one's checkpoint; held to parity's bounds."""
    plan = {"fsdp": 2, "shards": "params"}
    file = written(tmp_path, model_dirs, method, precision, plan=plan, run={"steps": LONG})
    verdict = check(
        file, left=parse_side("jax"), right=parse_side("torch"), precision=precision, steps=LONG, overrides=(),
        out=tmp_path / "out", resumption=parse_resumption(f"{side}:{LONG // 2}", from_other=True),
    )  # fmt: skip
    assert verdict.holds, verdict.comparison.first_divergence
    resumed = {f.location.step for f in verdict.comparison.findings if f.location.phase == "resume"}
    assert resumed == {LONG // 2 + 1}


PLANNED, STOPPED = 8, 4
RECORDS = 40


@pytest.fixture
def place(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A directory with a model, data, and the recipe of a run of PLANNED updates, which names both."""
    shutil.copytree(model_dirs["plain"], tmp_path / "m")
    records = QA.read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(records[:RECORDS]))
    (tmp_path / "heldout.jsonl").write_text("".join(records[-4:]))
    recipe = recipe_maker({"plain": tmp_path / "m"})(
        data={"train": str(tmp_path / "d.jsonl")},
        precision={"policy": "fp64", "reduce": "fp64"},
        schedule={"kind": "linear", "warmup_steps": 2},
        run={"steps": PLANNED},
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    return tmp_path


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.full
@pytest.mark.parametrize("program", ["torchtrain", "jaxtrain"])
def test_what_a_run_goes_on_with_is_known_by_content(program: str, place: Path):
    train = ["train", str(place / "r.yaml")]
    stop = words(f"run.stop_after_steps={STOPPED}")
    run(
        program,
        place / "1",
        [*train, "--out", str(place / "whole")],
        [*train, "--out", str(place / "half"), *stop],
    )
    # Model and data move; what is written in their old places has other contents.
    shutil.move(place / "m", place / "far/m")
    shutil.copyfile(place / "d.jsonl", place / "kept.jsonl")
    lines = (place / "d.jsonl").read_text().splitlines(keepends=True)
    (place / "d.jsonl").write_text("".join(reversed(lines)))
    write_tokenizer(place / "far")
    config = json.loads((place / "far/tokenizer_config.json").read_text())
    (place / "far/tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>"}))
    moved = words(f"model.from={place / 'far/m'}")
    kept = [*moved, *words(f"data.train={place / 'kept.jsonl'}")]
    heldout = words(f"data.heldout={place / 'heldout.jsonl'}")

    cases: dict[str, tuple[list[str], int, str]] = {
        "moved": ([*kept, *heldout, *words(f"data.cache={place / 'cache'}")], 0, "resuming after step 4 of 8"),
        "overwritten": (moved, 2, "continue anyway with --resume --allow data, or use the recipe it was made with"),
        "overwritten, the other allowed": ([*moved, "--allow", "schedule"], 2, "--allow data"),
        "overwritten, allowed": ([*moved, "--allow", "data"], 0, "allowed: data.train was "),
        "longer": ([*kept, *words("run.steps=20", "run.stop_after_steps=5")], 0,
                   "the schedule spanned 8 updates, now 20: the rate at step 5 is 0.000889 instead of 0.000667"),
        "schedule": ([*kept, *words("schedule.kind=cosine")], 2, "schedule.kind was 'linear' and is 'cosine'; continue anyway with --resume --allow schedule"),
        "schedule, allowed": ([*kept, *words("schedule.kind=cosine"), "--allow", "data", "--allow", "schedule"], 0,
                              "the rate at step 5 is 0.00075 instead of 0.000667"),
        "tokenizer": ([*kept, *words(f"data.tokenizer={place / 'far'}"), "--allow", "data,schedule"], 2, "the tokenizer's files"),
        "unknown word": ([*kept, "--allow", "date"], 2, "--allow date: unknown; did you mean 'data'?"),
        "done": ([*kept, *stop], 0, "resuming after step 4 of 4, from"),
    }  # fmt: skip
    argvs = []
    for name, (more, _, _) in cases.items():
        shutil.copytree(place / "half", place / name)
        argvs.append([*train, "--out", str(place / name), "--resume", *more])
    # What only reads a checkpoint is no run that goes on: other training data are nothing to it.
    reads = [
        ["eval", str(place / "r.yaml"), "--out", str(place / "half"), *moved, *heldout],
        ["export", str(place / "r.yaml"), "--out", str(place / "half"), *moved],
    ]
    results = run_many(program, [*argvs, *reads], place / "2")
    for (name, (_, code, message)), result in zip(cases.items(), results, strict=False):
        assert result["code"] == code, f"{name}: {result}"
        assert message in " ".join(result["err" if code else "out"].split()), f"{name}: {result}"
        assert not code or len(result["err"].strip().splitlines()) == 1, name
    for argv, result in zip(reads, results[len(cases) :], strict=True):
        assert result["code"] == 0, f"{argv}: {result}"
    last = f"step-{PLANNED:06d}"
    whole, same, other = (ends(place / name, last) for name in ("whole", "moved", "overwritten, allowed"))
    for part in PARTS:
        for name, array in whole[part].items():
            assert np.array_equal(array, same[part][name]), f"{part}/{name}"
            assert not np.array_equal(array, other[part][name]), f"{part}/{name}: the new data were not used"
    # What was refused changed nothing.
    for name in ("overwritten", "schedule", "tokenizer"):
        assert (place / name / "recipe.yaml").read_text() == (place / "half/recipe.yaml").read_text()


@pytest.mark.full
@pytest.mark.parametrize("program", ["jaxtrain", "torchtrain"])
def test_a_run_may_be_as_long_as_its_data_say(program: str, place: Path):
    train = ["train", str(place / "r.yaml"), "--out", str(place / "out")]
    epochs = words("run.steps=null", "run.epochs=0.5", "schedule.warmup_steps=0", "schedule.warmup_ratio=0.3")
    stored = place / "stored"
    shutil.copytree(ROOT / "tests/stored/run-332f762", stored)
    write_tokenizer(place)
    older = [
        "train", str(stored / "recipe.yaml"), "--out", str(stored), "--resume",
        *words(f"data.tokenizer={place}", f"data.cache={place / 'cache'}", "run.stop_after_steps=5"),
    ]  # fmt: skip
    first, again, old = run_many(
        program,
        [[*train, *epochs, *words("run.stop_after_steps=2")], [*train, *epochs, "--resume"], older],
        place / "1",
    )
    for result in (first, again, old):
        assert result["code"] == 0, result
    steps = load_recipe(place / "out/recipe.yaml").run.steps
    assert steps is not None
    assert load_recipe(place / "out/recipe.yaml").run.epochs is None
    [line] = [line for line in first["out"].splitlines() if "epochs of" in line]
    rows = int(line.split()[3])
    assert line == f"0.5 epochs of {rows} examples: {steps} updates, of which this run makes 2"
    assert steps == -(-rows // 8)  # half of them, four in an update
    # Going on is the same schedule: nothing is said of it, and the rates are those of all the run's updates.
    assert "the schedule spanned" not in again["out"]
    made = [json.loads(row) for row in (place / "out/metrics.jsonl").read_text().splitlines()]
    warmup = -(-3 * steps // 10)
    wanted = [i / warmup if i < warmup else (steps - i) / (steps - warmup) for i in range(steps)]
    assert [row["lr"] for row in made] == pytest.approx([1e-3 * rate for rate in wanted])
    # A checkpoint of commit 332f762, which then went on with these losses.
    assert "of an earlier version, which kept no digests" in old["out"]
    losses = [json.loads(row)["loss"] for row in (stored / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([6.2572, 6.2612], abs=1e-3)
    newest = folders.latest(stored)
    assert newest is not None
    identity: dict[str, Any] = json.loads((newest / "checkpoint.json").read_text())["identity"]
    assert identity["weights"] == "random"
