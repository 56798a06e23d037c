"""Hugging Face and PEFT directories, checkpoints, traces: written, read back, and damaged."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import SMALL, VARIANTS, write_checkpoint
from whole_arrays import save_checkpoint

from trainspec.checkpoints import checkpoint, folders, shards
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.export import export
from trainspec.data import Batch
from trainspec.errors import MachineError, RecipeError, TraceError, UserError, WeightsError
from trainspec.files.adapters import write_adapter
from trainspec.files.hf import MODEL_INDEX, read_model
from trainspec.files.tensors import save_tensors
from trainspec.init import starting_weights
from trainspec.methods import LoRA, adapter_table, trainable_table
from trainspec.params import param_table
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve
from trainspec.trace import StepTrace, Trace, TraceWriter

Make = Callable[..., Recipe]


def read(directory: Path, spec=SMALL) -> dict[str, np.ndarray]:
    return {p.name: w[...] for p, w in read_model(directory, spec, param_table(spec), dtype=np.float32)}


def test_sharded_and_whole_files_read_alike(tmp_path: Path):
    write_checkpoint(tmp_path / "one", SMALL)
    write_checkpoint(tmp_path / "many", SMALL, shard_bytes=30_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


def test_reading_holds_one_tensor_beyond_the_result(tmp_path: Path):
    spec = replace(SMALL, vocab=4000, layers=6)
    write_checkpoint(tmp_path / "m", spec, shard_bytes=500_000)
    largest = max(p.size for p in param_table(spec)) * 4
    tracemalloc.start()
    for _, weight in read_model(tmp_path / "m", spec, param_table(spec), dtype=np.float32):
        assert np.isfinite(weight[...]).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest  # the tensor, and the bytes it is made from
    assert peak < 0.6 * sum(p.size for p in param_table(spec)) * 4


@pytest.mark.parametrize("source", ["files", "random"])
def test_a_part_is_read_or_drawn_without_the_rest(make_recipe: Make, tmp_path: Path, source: str):
    spec = replace(SMALL, vocab=40_000)
    write_checkpoint(tmp_path / "m", spec)
    kind = "random" if source == "random" else "pretrained"
    recipe = make_recipe(model={"from": str(tmp_path / "m"), "weights": kind})
    for param, weight in starting_weights(resolve(recipe)):
        whole, part = weight[...], tuple(slice(size // 4, size // 2) for size in param.shape)
        tracemalloc.start()
        found = weight[part]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(found, whole[part])
        # Drawing takes some ten words per element.
        assert peak < 100_000 + (40 * found.nbytes if source == "random" else 2 * found.nbytes)


def test_bfloat16_files_are_read(tmp_path: Path):
    write_checkpoint(tmp_path, SMALL)
    whole = load_file(tmp_path / "model.safetensors")
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in whole.items()}, tmp_path / "model.safetensors")
    for name, array in read(tmp_path).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, whole[name].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_tied_head_that_is_stored_as_well_is_ignored(tmp_path: Path):
    write_checkpoint(tmp_path, VARIANTS["tied"])
    whole = load_file(tmp_path / "model.safetensors")
    save_file(whole | {"lm_head.weight": whole["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in read(tmp_path, VARIANTS["tied"])


def damage(directory: Path, how: str) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
            return
        case "no header":
            file.write_bytes(b"\x00" * 4)
            return
        case "gone":
            file.unlink()
            return
        case "missing":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:, :-1].copy()
        case "unexpected":
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name]
        case "integers":
            tensors[name] = tensors[name].astype(np.int32)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged or cut short"),
        ("no header", "damaged or cut short"),
        ("gone", "neither model.safetensors nor"),
        ("missing", "layers.1.mlp.up_proj.weight is missing"),
        ("shape", r"has shape \[48, 31\], the configuration requires \[48, 32\]"),
        ("unexpected", "layers.2.mlp.up_proj.weight is unexpected"),
        ("integers", "is stored as I32"),
    ],
)
def test_damaged_weights_are_refused_before_the_first_is_read(tmp_path: Path, how: str, message: str):
    write_checkpoint(tmp_path, SMALL)
    damage(tmp_path, how)
    with pytest.raises(WeightsError, match=message) as caught:
        read_model(tmp_path, SMALL, param_table(SMALL), dtype=np.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_damaged_index(tmp_path: Path, text: str):
    write_checkpoint(tmp_path, SMALL, shard_bytes=30_000)
    (tmp_path / MODEL_INDEX).write_text(text)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json|gone\.safetensors"):
        read_model(tmp_path, SMALL, param_table(SMALL), dtype=np.float32)


def test_bfloat16_is_known_without_a_framework(tmp_path: Path):
    write_checkpoint(tmp_path, SMALL)
    whole = load_file(tmp_path / "model.safetensors")
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in whole.items()}, tmp_path / "model.safetensors")
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainspec.files.hf import model_files\n"
        "print(model_files(Path(sys.argv[1])).read('model.norm.weight').dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert done.stdout == "bfloat16\n"


def trained(recipe: Recipe, spec=SMALL, *, scale: float = 0.1) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {p.name: scale * draws.normal(size=p.shape) for p in trainable_table(spec, recipe.method)}


def test_an_adapter_of_another_run_is_a_start(make_recipe: Make, tmp_path: Path):
    method = LoRA(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
    weights = {p.name: np.full(p.shape, i, np.float32) for i, p in enumerate(adapter_table(SMALL, method))}
    write_adapter(tmp_path / "a", weights, model=SMALL, method=method, base="x")
    recipe = make_recipe(method=method.model_dump() | {"adapter": str(tmp_path / "a")})
    started = {p.name: w[...] for p, w in starting_weights(resolve(recipe))}
    assert all(np.array_equal(started[name], array) for name, array in weights.items())
    for change, message in (
        ({"rank": 2}, "r=4, the recipe says 2; set method.rank=4"),
        ({"alpha": 16.0}, "set method.alpha=8"),
        ({"targets": ["q_proj"]}, "v_proj.lora_A.weight is unexpected"),
        ({"adapter": "nowhere"}, "missing; give an adapter directory"),
    ):
        other = make_recipe(method=method.model_dump() | {"adapter": str(tmp_path / "a")} | change)
        with pytest.raises(WeightsError, match=message):
            list(starting_weights(resolve(other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "starts from LORA only"),
        ({"use_dora": True}, "use_dora=True is unsupported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is unsupported"),
        ({"r": None}, "no r; it is not a LoRA configuration"),
    ],
)
def test_an_adapter_that_would_be_another_model_is_refused(
    make_recipe: Make, tmp_path: Path, change, message
):
    method = LoRA(rank=4, targets=("q_proj",))
    weights = {p.name: np.zeros(p.shape, np.float32) for p in adapter_table(SMALL, method)}
    write_adapter(tmp_path / "a", weights, model=SMALL, method=method, base="x")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | change))
    recipe = make_recipe(method=method.model_dump() | {"adapter": str(tmp_path / "a")})
    with pytest.raises(WeightsError, match=message):
        list(starting_weights(resolve(recipe)))


def test_adapters_that_are_not_finite_are_not_written(tmp_path: Path):
    method = LoRA(rank=4, targets=("q_proj",))
    weights = {p.name: np.full(p.shape, np.nan, np.float32) for p in adapter_table(SMALL, method)}
    with pytest.raises(WeightsError, match="not finite; nothing was written"):
        write_adapter(tmp_path / "a", weights, model=SMALL, method=method, base="x")
    assert list(tmp_path.iterdir()) == []


def save(out: Path, recipe: Recipe, step: int) -> Checkpoint:
    arrays = trained(recipe)
    saved = Checkpoint(
        step, arrays, {k: v + 1 for k, v in arrays.items()}, {k: v + 2 for k, v in arrays.items()}
    )
    save_checkpoint(out, saved, recipe=recipe)
    return saved


def names(out: Path) -> list[str]:
    """The checkpoints of a run, and what else lies beside them."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.name != "latest")


def test_checkpoint_reads_back_and_old_ones_go(make_recipe: Make, tmp_path: Path):
    recipe = make_recipe(precision={"policy": "fp64", "reduce": "fp64"}, checkpoint={"keep": 2})
    for step in (5, 10, 15):
        saved = save(tmp_path, recipe, step)
    assert names(tmp_path) == ["step-000010", "step-000015"]
    newest = folders.latest(tmp_path)
    assert newest is not None
    loaded = checkpoint.load(newest, resolve(recipe))
    assert loaded.step == 15
    for part in shards.KINDS:
        assert all(np.array_equal(a[...], getattr(saved, part)[n]) for n, a in getattr(loaded, part).items())


def test_files_are_readable_as_the_umask_says_and_a_failure_names_the_file(tmp_path: Path):
    save_tensors({"a": np.ones(3)}, tmp_path / "a.safetensors")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(OSError, match="not written") as found:
        save_tensors({"a": np.ones(3)}, tmp_path / "nowhere" / "a.safetensors")
    assert found.value.filename == str(tmp_path / "nowhere" / "a.safetensors")


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(make_recipe: Make, tmp_path: Path, monkeypatch):
    recipe = make_recipe()
    save(tmp_path, recipe, 5)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left", "weights.safetensors")

    monkeypatch.setattr("trainspec.checkpoints.portable.write_tensors", full_disk)
    with pytest.raises(
        MachineError, match=r"weights\.safetensors: no space left: step-000010 was not saved; .*make room"
    ):
        save(tmp_path, recipe, 10)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize(
    ("fill", "message"), [("inf", "not finite"), ("partial", "no checkpoint was written")]
)
def test_a_broken_moment_is_not_saved(make_recipe: Make, tmp_path: Path, fill: str, message: str):
    recipe = make_recipe()
    good = save(tmp_path, recipe, 5)
    name, array = next(iter(good.moment2.items()))
    broken = np.full(array.shape, np.inf) if fill == "inf" else array[...][:-1]
    bad = replace(good, step=10, moment2=dict(good.moment2) | {name: broken})
    with pytest.raises(WeightsError, match=message):
        save_checkpoint(tmp_path, bad, recipe=recipe)
    assert names(tmp_path) == ["step-000005"]


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path: Path):
    for name in ("step-999950", "step-1000000", "step-000050.bak"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-9999999").write_text("a file")
    newest = folders.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-1000000"


@pytest.mark.parametrize("change", [{"sha256": 3}, {"sha256": {}}, {"recipe": 3}, {"step": "x"}])
def test_a_damaged_head_is_refused(make_recipe: Make, tmp_path: Path, change: dict):
    recipe = make_recipe()
    save(tmp_path, recipe, 5)
    newest = folders.latest(tmp_path)
    assert newest is not None
    head = json.loads((newest / "checkpoint.json").read_text())
    for key in ("digest", "sizes"):  # as earlier versions wrote it; of the others any change is damage
        del head[key]
    (newest / "checkpoint.json").write_text(json.dumps(head | change))
    with pytest.raises(WeightsError, match="incomplete checkpoint"):
        checkpoint.load(newest, resolve(recipe))


def test_a_half_written_checkpoint_does_not_count(make_recipe: Make, tmp_path: Path):
    recipe = make_recipe()
    save(tmp_path, recipe, 5)
    (tmp_path / "checkpoints/.step-000010.tmp").mkdir()
    newest = folders.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-000005"
    save(tmp_path, recipe, 10)


def test_a_checkpoint_of_another_method_is_refused(make_recipe: Make, tmp_path: Path):
    """How it was trained is nothing to whoever only reads it: tests/trainspec/test_identity.py has who goes on."""
    recipe = make_recipe()
    save(tmp_path, recipe, 5)
    newest = folders.latest(tmp_path)
    assert newest is not None
    other = make_recipe(method=recipe.method.model_dump() | {"alpha": 9.0})
    with pytest.raises(RecipeError, match=r"method\.alpha=8\.0, the recipe says 9\.0; use the recipe"):
        checkpoint.load(newest, resolve(other))
    for section, fields in (("optimizer", {"lr": 5e-3}), ("data", {"packing": True}), ("run", {"steps": 99})):
        checkpoint.load(newest, resolve(make_recipe(**{section: fields})))


def test_a_damaged_checkpoint_is_refused(make_recipe: Make, tmp_path: Path):
    recipe = make_recipe()
    save(tmp_path, recipe, 5)
    newest = folders.latest(tmp_path)
    assert newest is not None
    file = newest / "moment2.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        checkpoint.load(newest, resolve(recipe))
    file.unlink()
    with pytest.raises(WeightsError, match="incomplete checkpoint"):
        checkpoint.load(newest, resolve(recipe))


def test_starting_over_an_earlier_run_is_refused(make_recipe: Make, tmp_path: Path):
    with pytest.raises(RecipeError, match="found no checkpoint"):
        checkpoint.resumable_checkpoint(tmp_path, resume=True)
    save(tmp_path, make_recipe(), 5)
    with pytest.raises(RecipeError, match="--resume, or give another --out"):
        checkpoint.resumable_checkpoint(tmp_path, resume=False)
    assert checkpoint.resumable_checkpoint(tmp_path, resume=True) is not None


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_export_merges_by_hand_computed_numbers(make_recipe: Make, model_dirs, tmp_path: Path, variant: str):
    spec, recipe = VARIANTS[variant], make_recipe(variant)
    arrays = trained(recipe, spec)
    zeros = {k: np.zeros_like(v) for k, v in arrays.items()}
    save_checkpoint(tmp_path, Checkpoint(3, arrays, zeros, zeros), recipe=recipe)
    target = export(recipe, out=tmp_path, merge=True, shard_bytes=30_000)
    assert (target / "tokenizer.json").is_file()
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    before, after = read(model_dirs[variant], spec), read(target, spec)
    name = "model.layers.1.self_attn.q_proj"
    a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float32) for x in "AB")
    assert np.abs(after[f"{name}.weight"] - (before[f"{name}.weight"] + 8.0 / 4 * b @ a)).max() < 1e-6
    assert np.array_equal(before["model.norm.weight"], after["model.norm.weight"])


def test_export_keeps_what_a_person_put_there(make_recipe: Make, tmp_path: Path):
    recipe = make_recipe()
    arrays = trained(recipe)
    save_checkpoint(tmp_path, Checkpoint(3, arrays, arrays, arrays), recipe=recipe)
    export(recipe, out=tmp_path, merge=True, shard_bytes=30_000)
    (tmp_path / "merged/README.md").write_text("my card")
    target = export(recipe, out=tmp_path, merge=True)
    assert (target / "README.md").read_text() == "my card"
    assert [p.name for p in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_export_says_what_is_missing(make_recipe: Make, tmp_path: Path):
    with pytest.raises(RecipeError, match="no checkpoint to export"):
        export(make_recipe(), out=tmp_path, merge=False)


def one_step_trace(directory: Path) -> None:
    ints = np.zeros((2, 3), np.int32)
    batch = Batch(ints, ints + 1, ints + 2, ints + 3, np.arange(2, dtype=np.int32))
    arrays = {"w": np.array([1.0, 2.0], ml_dtypes.bfloat16)}
    writer = TraceWriter(directory)
    writer.initial({"w": np.ones(2)})
    for step in (1, 2):
        writer.step(StepTrace(step, batch, 6.0, 3, 0.5, 1e-3, arrays, arrays, arrays, arrays))


def test_trace_reads_back(tmp_path: Path):
    one_step_trace(tmp_path)
    trace = Trace(tmp_path)
    assert trace.steps[0] == {
        "step": 1,
        "loss_sum": 6.0,
        "tokens": 3,
        "loss": 2.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
    }
    assert trace.initial_names() == ["weight/w"]
    assert set(trace.names(2)) == {f"batch/{b}" for b in ("input_ids", "labels", "positions", "segments")} | {
        f"{g}/w" for g in ("gradient", "update", "moment1", "moment2")
    }
    assert trace.read(1, "gradient/w").dtype == ml_dtypes.bfloat16


def test_a_trace_replaces_a_trace_and_nothing_else(tmp_path: Path):
    one_step_trace(tmp_path / "t")
    (tmp_path / "t/mine.jsonl").write_text("{}")
    TraceWriter(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["mine.jsonl", "trace.jsonl"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("{}")
    with pytest.raises(TraceError, match="holds other files"):
        TraceWriter(tmp_path / "data")
    assert (tmp_path / "data/train.jsonl").read_text() == "{}"


def test_damaged_traces_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(TraceError, match="give the directory"):
        Trace(tmp_path)
    one_step_trace(tmp_path)
    file = tmp_path / "step-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(TraceError, match="incomplete"):
        Trace(tmp_path).names(1)
    rows = (tmp_path / "trace.jsonl").read_text()
    for text in ("", rows[:-5], "{}\n", rows.split("\n")[1] + "\n"):
        (tmp_path / "trace.jsonl").write_text(text)
        with pytest.raises(UserError) as caught:
            Trace(tmp_path)
        assert "\n" not in str(caught.value)
