"""trainspec checkpoint show | verify | consolidate | convert."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sharded import save_sharded
from small import SMALL
from whole_arrays import save_checkpoint

from trainspec.checkpoints import folders
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.export import export
from trainspec.checkpoints.identity import Identity, model_digest, weights_digest
from trainspec.checkpoints.manifest import read_manifest
from trainspec.cli import main
from trainspec.methods import trainable_table
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

Make = Callable[..., Recipe]
FULL = {"kind": "full"}
PREFIX = {"kind": "prefix", "virtual_tokens": 3}


def drawn(recipe: Recipe, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    draws = np.random.default_rng(seed)
    table = trainable_table(SMALL, recipe.method)
    return {
        kind: {p.name: 0.1 * draws.normal(size=p.shape).astype(np.float32) for p in table}
        for kind in ("weights", "moment1", "moment2")
    }


def identity(recipe: Recipe) -> Identity:
    run = resolve(recipe)
    return Identity(model_digest(run.spec), weights_digest(run), "", "d" * 64, "")


def ended(capsys: Any, *words: str | Path) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: Any, *words: str | Path) -> str:
    code, out, err = ended(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    return err


def test_show_says_what_is_in_it(make_recipe: Make, tmp_path: Path, capsys: Any):
    recipe = make_recipe(plan={"fsdp": 2, "shards": "params"}, batch={"global_examples": 8})
    for step, loss in ((5, None), (10, 1.25)):
        path = save_sharded(
            tmp_path, drawn(recipe), recipe=recipe, step=step, backend="torch", versions={"torch": "2.9"},
            heldout_loss=loss, identity=identity(recipe),
        )  # fmt: skip
    code, text, _ = ended(capsys, "show", tmp_path)
    assert code == 0
    wanted = (
        ("step", "10, after 80 examples of the order of run.seed=0"), ("held-out loss", "1.250000"),
        ("written by", "torch with torch 2.9"), ("processes", "2"), ("plan", "fsdp 2, shards params"),
        ("method", "lora, rank=4, alpha=8.0"), ("digest of data", "d" * 64),
        ("weights", "8 tensors, 1,088 parameters, float32"),
    )  # fmt: skip
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == str(path)
    for name, words in wanted:
        assert any(line.startswith(name) and words in line for line in lines), (name, lines)
    code, text, _ = ended(capsys, "show", tmp_path / "checkpoints/step-000005", "--json")
    facts = json.loads(text)
    assert (facts["step"], facts["examples"], facts["heldout_loss"]) == (5, 40, None)
    assert facts["arrays"]["moment2"] == {"tensors": 8, "parameters": 1088, "dtypes": ["float32"]}
    assert facts["files"] == {file.name: file.stat().st_size for file in (tmp_path / "checkpoints/step-000005").iterdir()}  # fmt: skip
    # The recipe's digest is of what it says, not of how it is written.
    other = save_sharded(tmp_path / "o", drawn(recipe), recipe=make_recipe(run={"seed": 1}), step=5)
    digests = {json.loads(ended(capsys, "show", p, "--json")[1])["recipe"] for p in (tmp_path, path, other)}
    assert len(digests) == 2


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def forge(path: Path, file: Path) -> None:
    """Let the manifest say that this is the file that was written."""
    manifest, data = read_manifest(path), file.read_bytes()
    told = {"digests": hashlib.sha256(data).hexdigest(), "sizes": len(data)}
    replace(
        manifest, **{key: {**getattr(manifest, key), file.name: each} for key, each in told.items()}
    ).write(path)


def of_the_step_before(file: Path) -> None:
    shutil.copyfile(file.parent.with_name("step-000001") / file.name, file)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, Path.unlink, of_the_step_before])
def test_verify_names_what_is_damaged(make_recipe: Make, tmp_path: Path, capsys: Any, damage: Any):
    recipe = make_recipe()
    older, path = (save_sharded(tmp_path, drawn(recipe, step), recipe=recipe, step=step) for step in (1, 2))
    assert ended(capsys, "verify", tmp_path) == (0, f"{path}: whole\n", "")
    for file in sorted(path.glob("*.safetensors")):
        before = file.read_bytes()
        damage(file)
        code, text, err = ended(capsys, "verify", tmp_path)
        assert (code, err, text.count("\n"), text.startswith(f"{file}: ")) == (1, "", 1, True), text
        file.write_bytes(before)
    names = ["weights-00001-of-00002.safetensors", "moment1-00000-of-00002.safetensors"]
    for name in names:
        damage(path / name)
    code, text, _ = ended(capsys, "verify", tmp_path, "--all")
    assert (code, text.count("\n")) == (1, 3), text
    assert f"{older}: whole\n" in text
    assert all(f"{path / name}: " in text for name in names)


def test_verify_reads_what_the_manifest_says(make_recipe: Make, tmp_path: Path, capsys: Any):
    recipe = make_recipe()
    path = save_sharded(tmp_path, drawn(recipe), recipe=recipe, step=2)
    (tmp_path / "checkpoints/.step-000003.tmp").mkdir()
    (tmp_path / "checkpoints/step-000001.damaged").mkdir()
    code, text, _ = ended(capsys, "verify", tmp_path, "--all")
    assert code == 0
    assert [line.partition(": ")[2] for line in text.splitlines()] == [
        "whole", "unfinished, not used", "set aside, not used",
    ]  # fmt: skip
    assert "is one checkpoint; give the run's directory" in refused(capsys, "verify", path, "--all")
    assert ended(capsys, "verify", tmp_path / "checkpoints")[0] == 0
    # A shard is left out, and its digest with it.
    manifest = read_manifest(path)
    left = {
        name: each for name, each in manifest.digests.items() if name != "moment1-00000-of-00002.safetensors"
    }
    replace(manifest, digests=left).write(path)
    code, text, _ = ended(capsys, "verify", path)
    assert code == 1
    assert "incomplete checkpoint: no file has all of base_model" in text
    assert "no file has all of base_model" in refused(capsys, "consolidate", path, "--out", tmp_path / "to")
    for content in (None, "", "{}", '{"step": 1'):
        (path / "checkpoint.json").unlink() if content is None else (path / "checkpoint.json").write_text(
            content
        )
        code, text, _ = ended(capsys, "verify", path)
        assert (code, text.count("\n")) == (1, 1)
        assert text.startswith(f"{path}: incomplete checkpoint")


def test_a_forged_digest_is_not_seen_by_verification(make_recipe: Make, tmp_path: Path, capsys: Any):
    """What looks right in every file is for parity to find: `resume-of-an-older-shard` in docs/faults.md."""
    recipe = make_recipe()
    path = [save_sharded(tmp_path, drawn(recipe, s), recipe=recipe, step=s) for s in (1, 2)][-1]
    file = path / "moment1-00001-of-00002.safetensors"
    of_the_step_before(file)
    forge(path, file)
    assert ended(capsys, "verify", path)[0] == 0


def test_names_without_their_prefix_are_refused(make_recipe: Make, tmp_path: Path, capsys: Any):
    """What a tolerant reader would leave at its start, as `resume-loses-adapter-names` in docs/faults.md does."""
    recipe = make_recipe()
    path = save_sharded(tmp_path, drawn(recipe), recipe=recipe, step=1)
    for file in path.glob("weights-*.safetensors"):
        save_file(
            {key.removeprefix("base_model.model."): array for key, array in load_file(file).items()}, file
        )
        forge(path, file)
    code, text, _ = ended(capsys, "verify", path)
    assert code == 1
    assert "the checkpoint has no such tensor" in text
    assert "the checkpoint has no such tensor" in refused(
        capsys, "consolidate", path, "--out", tmp_path / "to"
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("method", "words"), [(None, []), (None, ["--merge", "--dtype", "bfloat16"]), (FULL, []), (PREFIX, [])]
)
def test_consolidate_writes_what_export_does(make_recipe: Make, tmp_path: Path, capsys: Any, method: Any, words: list[str]):  # fmt: skip
    """From any number of shards the same bytes."""
    recipe = make_recipe(**({"method": method} if method else {}))
    arrays = drawn(recipe)
    save_checkpoint(tmp_path / "whole", Checkpoint(3, *arrays.values()), recipe=recipe)
    merge = "--merge" in words
    wanted = contents(export(recipe, out=tmp_path / "whole", merge=merge, dtype=words[-1] if merge else None))
    assert len(wanted) >= 4
    for processes in (1, 3):
        out = tmp_path / str(processes)
        save_sharded(out, arrays, recipe=recipe, step=3, processes=processes)
        code, said, err = ended(capsys, "consolidate", out, "--out", out / "to", *words)
        assert (code, said) == (0, f"wrote {out / 'to'}\n"), err
        assert contents(out / "to") == wanted


def test_the_model_may_have_moved(
    make_recipe: Make, model_dirs: dict[str, Path], tmp_path: Path, capsys: Any
):
    shutil.copytree(model_dirs["plain"], tmp_path / "m")
    recipe = make_recipe(model={"from": str(tmp_path / "m")})
    path = save_sharded(tmp_path, drawn(recipe), recipe=recipe, step=1, identity=identity(recipe))
    shutil.move(tmp_path / "m", tmp_path / "far")
    words = ("consolidate", path, "--out", tmp_path / "to", "--merge")
    assert "if the model has moved, name it with --set model.from=DIR" in refused(capsys, *words)
    assert ended(capsys, *words, "--set", f"model.from={tmp_path / 'far'}")[0] == 0
    file = tmp_path / "far/model.safetensors"
    save_file({name: array + 1 for name, array in load_file(file).items()}, file)
    words = ("consolidate", path, "--out", tmp_path / "other", "--merge")
    assert "the model's weights are not those" in refused(
        capsys, *words, "--set", f"model.from={tmp_path / 'far'}"
    )
    assert "model.form: unknown" in refused(capsys, *words, "--set", "model.form=x")


def test_what_is_damaged_is_not_consolidated(make_recipe: Make, tmp_path: Path, capsys: Any):
    recipe = make_recipe()
    path = save_sharded(tmp_path, drawn(recipe), recipe=recipe, step=1)
    words = ("consolidate", path, "--out", tmp_path / "to")
    assert "give another directory" in refused(capsys, "consolidate", path, "--out", path)
    assert "give another directory" in refused(capsys, "consolidate", path, "--out", tmp_path)
    flipped(path / "moment2-00001-of-00002.safetensors")
    assert "damaged" in refused(capsys, *words)
    assert not (tmp_path / "to").exists()


def test_what_is_there_is_not_written_over(make_recipe: Make, tmp_path: Path, capsys: Any):
    """`export` renews what it has written under --out; a directory that a user names is left as it is."""
    path = save_sharded(tmp_path / "run", drawn(make_recipe()), recipe=make_recipe(), step=1)
    to = tmp_path / "to"
    (to / "empty").mkdir(parents=True)
    assert ended(capsys, "consolidate", path, "--out", to / "empty")[0] == 0  # control
    before = contents(to / "empty")
    for words in (
        ("consolidate", path, "--out", to / "empty"),
        ("convert", path, to / "empty", "--to", "peft"),
    ):
        line = refused(capsys, *words)
        assert line == f"trainspec: {to / 'empty'}: is there already; give another directory, or remove it\n"
    assert contents(to / "empty") == before
    assert "is there already" in refused(capsys, "consolidate", path, "--out", to)  # somebody else's
    for _ in range(2):
        export(make_recipe(), out=tmp_path / "run", merge=False)


def test_convert_writes_or_says_why_not(make_recipe: Make, tmp_path: Path, capsys: Any):
    for name, method in (("lora", None), ("full", FULL), ("prefix", PREFIX)):
        recipe = make_recipe(**({"method": method} if method else {}))
        save_sharded(tmp_path / name, drawn(recipe), recipe=recipe, step=1)
    written = {
        ("lora", "peft"): "adapter_model.safetensors", ("lora", "hf"): "model.safetensors",
        ("full", "hf"): "model.safetensors", ("prefix", "peft"): "adapter_model.safetensors",
    }  # fmt: skip
    for (name, to), file in written.items():
        out = tmp_path / f"{name}-{to}"
        assert ended(capsys, "convert", tmp_path / name, out, "--to", to)[0] == 0
        assert (out / file).is_file()
    for name, to, why in (
        ("full", "peft", "trains the model itself and has no adapter; give --to hf"),
        ("prefix", "hf", "cannot be merged"),
        ("lora", "portable", "in that format already"),
        ("lora", "universal", "every tensor pickled"),
        ("lora", "trainer", "optimizer pickled (optimizer.pt)"),
    ):
        assert why in refused(capsys, "convert", tmp_path / name, tmp_path / "to", "--to", to)
        assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(("to", "saved"), [("portable", "native"), ("native", "portable")])
def test_a_conversion_between_the_formats_takes_no_setting(
    make_recipe: Make, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, to: str, saved: str
):
    path = save_sharded(tmp_path, drawn(make_recipe()), recipe=make_recipe(), step=1)
    replace(read_manifest(path), format=saved, backend="jax").write(path)
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    words = ("convert", path, tmp_path / "to", "--to", to)
    for option, value in (("--dtype", "bfloat16"), ("--set", "model.from=elsewhere")):
        said = refused(capsys, *words, option, value)
        assert f"{option}: --to {to} " in said
        assert "leave it out" in said
    assert not started
    assert ended(capsys, *words) == (0, f"wrote {tmp_path / 'to'}\n", "")  # control
    assert [command[1:3] for command in started] == [["-m", "jaxtrain.native"]]


def test_a_native_format_of_nobody_here_is_named(make_recipe: Make, tmp_path: Path, capsys: Any):
    path = save_sharded(tmp_path, drawn(make_recipe()), recipe=make_recipe(), step=1)
    for backend in ("other", "torch", None):
        replace(read_manifest(path), format="native", backend=backend).write(path)
        assert f"{path}: is in the native format of {backend or 'an unnamed backend'}, which no backend here reads" in refused(
            capsys, "convert", path, tmp_path / "to", "--to", "portable"
        )  # fmt: skip


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: Any):
    for name, why in (
        ("trainer_state.json", "its optimizer.pt and scheduler.pt are pickles"),
        ("global_step5", "DeepSpeed left this"),
        ("notes.txt", "no checkpoint there"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert why in refused(capsys, "show", tmp_path / name)
        assert why in refused(capsys, "verify", tmp_path / name, "--all")
    assert "no such directory" in refused(capsys, "show", tmp_path / "nowhere")
    assert folders.latest(tmp_path) is None


@pytest.mark.full
def test_native_and_back_is_the_same_state(make_recipe: Make, tmp_path: Path, capsys: Any):
    recipe = make_recipe()
    arrays, native, back = drawn(recipe), tmp_path / "native", tmp_path / "back"
    path = save_sharded(tmp_path, arrays, recipe=recipe, step=4, backend="torch")
    assert ended(capsys, "convert", path, native, "--to", "native") == (0, f"wrote {native}\n", "")
    assert "is there already" in refused(capsys, "convert", path, native, "--to", "native")
    assert ended(capsys, "verify", native) == (0, f"{native}: whole\n", "")
    facts = json.loads(ended(capsys, "show", native, "--json")[1])
    assert (facts["format"], facts["backend"], facts["step"]) == ("native", "jax", 4)
    assert facts["arrays"]["moment1"]["parameters"] == sum(a.size for a in arrays["moment1"].values())
    for words in (
        ("consolidate", native, "--out", tmp_path / "to"),
        ("convert", native, tmp_path / "to", "--to", "hf"),
    ):
        assert "convert it: trainspec checkpoint convert" in refused(capsys, *words)
    assert ended(capsys, "convert", native, back, "--to", "portable")[0] == 0
    for kind, of_kind in arrays.items():
        found = load_file(back / f"{kind}.safetensors")
        assert found.keys() == of_kind.keys()
        assert all(np.array_equal(found[name], array) for name, array in of_kind.items())
    flipped(
        next(
            file
            for file in sorted((native / "native").rglob("*"))
            if file.is_file() and file.stat().st_size > 1000
        )
    )
    assert "damaged" in refused(capsys, "convert", native, tmp_path / "to", "--to", "portable")
