"""What a run is made of is known by content; going on with something else is refused, or allowed and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import QA, SMALL, write_checkpoint, write_tokenizer
from whole_arrays import save_checkpoint

from trainspec.checkpoints import checkpoint, folders
from trainspec.checkpoints.allow import ALLOWABLE
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.identity import (
    RANDOM,
    Identity,
    identity_of,
    model_digest,
    start_digest,
    weights_digest,
)
from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.resume import FIXED, CheckpointOrigin, check_resumable
from trainspec.data import open_dataset
from trainspec.errors import RecipeError, UserError, WeightsError
from trainspec.files.adapters import write_adapter
from trainspec.files.hf import resolve_model
from trainspec.init import starting_weights
from trainspec.methods import LoRA, PromptTuning, adapter_table, trainable_table
from trainspec.recipe import ModelSource, Recipe, load_recipe, recipe_from
from trainspec.rope import LinearScaling, Llama3Scaling
from trainspec.runs.run import Run, resolve, run_of

Make = Callable[..., Recipe]
STORED = Path(__file__).parent.parent / "stored"


def pretrained(directory: Path) -> ModelSource:
    return ModelSource.model_validate({"from": str(directory)})


# Model


def test_a_models_digest_is_of_its_rules_not_of_its_name():
    wanted = model_digest(SMALL)
    assert model_digest(replace(SMALL, name="other")) == wanted
    changed = [
        replace(SMALL, layers=3),
        replace(SMALL, rope_theta=5e5),
        replace(SMALL, norm_eps=1e-6),
        replace(SMALL, tied_embeddings=True),
        replace(SMALL, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
        replace(SMALL, rope_scaling=LinearScaling(8.0)),
    ]
    digests = {model_digest(model) for model in changed}
    assert len(digests) == len(changed)
    assert wanted not in digests


def run_on(source: ModelSource, spec: Any) -> Run:
    recipe = recipe_from({"model": source.model_dump(by_alias=True), "data": {"train": "none"}})
    return run_of(recipe, spec, None if source.weights == "random" else Path(source.from_))


def test_weights_are_known_wherever_and_however_they_lie(tmp_path: Path):
    one = write_checkpoint(tmp_path / "one", SMALL)
    sharded = write_checkpoint(tmp_path / "far/away", SMALL, shard_bytes=20_000)
    assert (sharded / "model.safetensors.index.json").exists()
    wanted = weights_digest(run_on(pretrained(one), SMALL))
    assert weights_digest(run_on(pretrained(sharded), SMALL)) == wanted
    # Names in a file have no order, and rotary frequencies are derived.
    tensors = load_file(one / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    save_file(dict(reversed(tensors.items())) | extra, one / "model.safetensors")
    assert weights_digest(run_on(pretrained(one), SMALL)) == wanted


def test_other_weights_of_the_same_shapes_are_noticed(tmp_path: Path):
    directory = write_checkpoint(tmp_path / "m", SMALL)
    wanted = weights_digest(run_on(pretrained(directory), SMALL))
    tensors = load_file(directory / "model.safetensors")
    seen = {wanted}
    for name, array in tensors.items():
        # As small a change as an update of fine-tuning makes, on one tensor only.
        save_file(tensors | {name: array * np.float32(1 + 1e-6)}, directory / "model.safetensors")
        seen.add(weights_digest(run_on(pretrained(directory), SMALL)))
    assert len(seen) == len(tensors) + 1
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        save_file({k: v.astype(dtype) for k, v in tensors.items()}, directory / "model.safetensors")
        seen.add(weights_digest(run_on(pretrained(directory), SMALL)))
    assert len(seen) == len(tensors) + 4


def test_weights_are_sampled_not_read(tmp_path: Path):
    """The limit of it, on purpose: one element in the middle of a long row is not seen."""
    wide = replace(SMALL, embed=1024)
    directory = write_checkpoint(tmp_path / "m", wide)
    wanted = weights_digest(run_on(pretrained(directory), wide))
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][1, 600] += 1
    save_file(tensors, directory / "model.safetensors")
    assert weights_digest(run_on(pretrained(directory), wide)) == wanted
    tensors[name][0, 0] += 1
    save_file(tensors, directory / "model.safetensors")
    assert weights_digest(run_on(pretrained(directory), wide)) != wanted


def test_random_weights_have_no_digest():
    source = ModelSource.model_validate({"from": "preset:tiny", "weights": "random"})
    assert weights_digest(run_on(source, resolve_model(source)[0])) == RANDOM


def test_files_of_another_model_have_no_digest(tmp_path: Path):
    directory = write_checkpoint(tmp_path / "m", SMALL)
    with pytest.raises(WeightsError, match="requires"):
        weights_digest(run_on(pretrained(directory), replace(SMALL, mlp=64)))


def test_a_methods_start_is_known_by_content(tmp_path: Path):
    method = LoRA(rank=2, targets=("q_proj",))
    weights = {p.name: np.ones(p.shape, np.float32) for p in adapter_table(SMALL, method)}
    for name, array, base in (
        ("a", weights, "x"),
        ("moved/a", weights, "y"),
        ("b", {k: v * 2 for k, v in weights.items()}, "x"),
    ):
        write_adapter(tmp_path / name, array, model=SMALL, method=method, base=base)
    one, moved, other = (
        start_digest(method.model_copy(update={"adapter": str(tmp_path / n)})) for n in ("a", "moved/a", "b")
    )
    assert one == moved  # also where another base is written beside it
    assert len({"", one, other}) == 3
    assert start_digest(method) == ""
    words = [start_digest(PromptTuning(init="text", text=text)) for text in ("a word", "a wort")]
    assert len({"", *words}) == 3


# Going on


@pytest.fixture
def made(make_recipe: Make, tmp_path: Path) -> Callable[..., tuple[Recipe, CheckpointOrigin, Identity]]:
    """A recipe, a checkpoint of it at step 5, and its identity."""

    def make(**sections: Any) -> tuple[Recipe, CheckpointOrigin, Identity]:
        recipe = make_recipe(**sections)
        model, _ = resolve_model(recipe.model)
        identity = identity_of(resolve(recipe), open_dataset(resolve(recipe), "train"))
        zeros = {p.name: np.zeros(p.shape, np.float32) for p in trainable_table(model, recipe.method)}
        path = save_checkpoint(
            tmp_path / "out", Checkpoint(5, zeros, zeros, zeros), recipe=recipe, identity=identity
        )
        return recipe, checkpoint.read_origin(path), identity

    return make


def goes_on(made: CheckpointOrigin, recipe: Recipe, *allow: str) -> list[str]:
    run = resolve(recipe)
    identity = identity_of(run, open_dataset(run, "train"))
    span = recipe.span(lambda: 1)
    return check_resumable(made, recipe, identity, steps=span.steps, allow=allow)


def test_a_checkpoint_says_what_it_was_made_of(made):
    recipe, found, identity = made()
    assert found.identity == identity
    assert found.recipe == recipe
    assert found.step == 5
    head = json.loads((found.path / "checkpoint.json").read_text())
    assert set(head["identity"]) == {"model", "weights", "tokenizer", "data", "method"}
    assert all(len(digest) == 64 for part, digest in head["identity"].items() if part != "method")


def test_paths_are_free(made, make_recipe: Make, model_dirs: dict[str, Path], tmp_path: Path):
    _, found, _ = made()
    shutil.copytree(model_dirs["plain"], tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(QA, tmp_path / "elsewhere/other-name.jsonl")
    moved = make_recipe(
        model={"from": str(tmp_path / "moved")},
        data={
            "train": str(tmp_path / "elsewhere/other-name.jsonl"),
            "heldout": str(QA),
            "cache": str(tmp_path / "new-cache"),
            "tokenizer": str(tmp_path / "moved"),
        },
        plan={"fsdp": 2, "shards": "optimizer"},
        precision={"policy": "bf16"},
        batch={"accumulation": 2},
        checkpoint={"every_steps": 7},
        run={"eval_every_steps": 3, "stop_after_steps": 2},
    )
    # Where and how it computes is free, and said, as it rounds otherwise.
    assert goes_on(found, moved) == [
        "precision.policy was 'fp32', now 'bf16'",
        "plan.fsdp was 1, now 2, plan.shards was 'nothing', now 'optimizer'",
    ]
    back = moved.model_copy(update={name: getattr(found.recipe, name) for name in ("plan", "precision")})
    assert goes_on(found, back) == []


def overwritten(directory: Path, name: str, change: Callable[[Any], None]) -> None:
    """A JSON file of a model directory, changed in its place."""
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def other_config(directory: Path) -> None:
    overwritten(directory, "config.json", lambda c: c["rope_parameters"].update(rope_theta=5e5))


def other_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v * np.float32(1.01) for k, v in tensors.items()}, directory / "model.safetensors")


def other_tokenizer(directory: Path) -> None:
    overwritten(directory, "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_config, r"the model's settings \(config.json\) are not .* set model\.from to the model"),
        (other_weights, r"the model's weights are not those .* set model\.from to the model"),
        (
            other_tokenizer,
            r"the tokenizer's files .* are not those .* name a directory that has them in data\.tokenizer",
        ),
    ],
)
def test_another_model_or_tokenizer_is_refused_whatever_is_allowed(
    make_recipe: Make, made, model_dirs: dict[str, Path], tmp_path: Path, change, message: str
):
    """In the same place, under the same name: only the content tells."""
    directory = tmp_path / "m"
    shutil.copytree(model_dirs["plain"], directory)
    recipe, found, _ = made(model={"from": str(directory)})
    assert goes_on(found, recipe) == []
    change(directory)
    with pytest.raises(RecipeError, match=message):
        goes_on(found, recipe, *ALLOWABLE)


def test_another_start_of_the_method_is_refused(made, tmp_path: Path):
    method = LoRA(rank=4, targets=("q_proj",))
    weights = {p.name: np.ones(p.shape, np.float32) for p in adapter_table(SMALL, method)}
    write_adapter(tmp_path / "a", weights, model=SMALL, method=method, base="x")
    recipe, found, _ = made(method=method.model_dump() | {"adapter": str(tmp_path / "a")})
    assert goes_on(found, recipe) == []
    without = recipe.model_copy(update={"method": method})
    with pytest.raises(
        RecipeError, match=r"method\.adapter was .* and is null; set method\.adapter to that of"
    ):
        goes_on(found, without, *ALLOWABLE)
    write_adapter(
        tmp_path / "a", {k: v * 2 for k, v in weights.items()}, model=SMALL, method=method, base="x"
    )
    with pytest.raises(RecipeError, match=r"method\.adapter was '.*' \(digest \w{8}\) and is '"):
        goes_on(found, recipe, *ALLOWABLE)


def test_data_that_were_overwritten_are_refused_or_said(made, tmp_path: Path):
    file = tmp_path / "d.jsonl"
    shutil.copyfile(QA, file)
    recipe, found, _ = made(data={"train": str(file)})
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    with pytest.raises(
        RecipeError, match=r"data\.train was .*d\.jsonl \(digest \w{8}\) and is .*--allow data, or use"
    ) as caught:
        goes_on(found, recipe, "schedule")
    assert "\n" not in str(caught.value)
    [said] = goes_on(found, recipe, "data")
    assert said.startswith("allowed: data.train was ")
    file.write_text("".join(lines) + "\n")  # a blank line is no record: the tokens are the same
    assert goes_on(found, recipe) == []


# What each setting may become, that its comparison can be seen.
OTHER: dict[str, Any] = {
    "data.sequence_tokens": 100, "data.packing": True, "data.padding_side": "left", "data.loss_on": "all",
    "data.too_long": "cut", "schedule.kind": "linear", "schedule.warmup_steps": 2, "schedule.warmup_ratio": 0.5,
    "schedule.final_ratio": 0.5, "optimizer.lr": 5e-3, "model.weights": "random", "run.seed": 1,
    "batch.global_examples": 8, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-6, "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": None,
}  # fmt: skip


def changed(make_recipe: Make, key: str) -> Recipe:
    section, name = key.split(".")
    return make_recipe(**{section: {name: OTHER[key]}})


def test_what_may_change_is_refused_said_or_allowed(made, make_recipe: Make):
    _, found, _ = made()
    for group, keys in ALLOWABLE.items():
        for key in keys:
            recipe = changed(make_recipe, key)
            with pytest.raises(
                RecipeError, match=rf"{key} was .* and is .* --allow {group}, or use the recipe"
            ):
                goes_on(found, recipe, *(set(ALLOWABLE) - {group}))
            told = goes_on(found, recipe, group)
            assert told[0].startswith(f"allowed: {key} was "), key
    for key in FIXED:
        with pytest.raises(RecipeError, match=rf"was made with {key}=.*, the recipe says .*; use the recipe"):
            goes_on(found, changed(make_recipe, key), *ALLOWABLE)
    both = make_recipe(data={"packing": True}, schedule={"kind": "linear"})
    with pytest.raises(
        RecipeError, match=r"data\.packing was .*, schedule\.kind was .* --allow data,schedule, or"
    ):
        goes_on(found, both)


def test_every_setting_is_compared_or_free_on_purpose():
    """A setting that is added later has to be thought of here."""
    free = {
        "model": {"from_"},  # by content
        "data": {"train", "heldout", "tokenizer", "chat_template", "cache"}  # by content, or measured only
        | {
            "task",
            "prompts",
            "language",
            "columns",
            "ignore",
            "bad_records",
            "system",
            "date",
        },  # they decide the tokens, which are compared
        "batch": {"accumulation"},  # as with a plan, the update is the same
        "plan": None,
        "precision": None,
        "checkpoint": None,
        "run": {"steps", "epochs", "stop_after_steps", "eval_every_steps", "eval_generations"},
        "method": None,  # all but `adapter`, which is compared by content
    }
    compared = {key for keys in (FIXED, *ALLOWABLE.values()) for key in keys}
    for name, field in Recipe.model_fields.items():
        known = free.get(name, set())
        if known is not None:
            settings = set(field.annotation.model_fields)  # type: ignore[union-attr]
            assert settings - known == {
                key.split(".")[1] for key in compared if key.startswith(f"{name}.")
            }, name
    assert compared == set(OTHER)


def test_a_schedule_of_another_length_is_said(made, make_recipe: Make):
    _, found, _ = made(schedule={"kind": "linear"}, run={"steps": 8})
    longer = make_recipe(schedule={"kind": "linear"}, run={"steps": 20})
    assert goes_on(found, longer) == [
        "the schedule spanned 8 updates, now 20: the rate at step 6 is 0.00075 instead of 0.000375"
    ]
    constant = make_recipe(schedule={"kind": "constant"}, run={"steps": 20})
    assert goes_on(found, constant, "schedule")[-1].endswith(
        "the rate at step 6 is 0.001 instead of 0.000375"
    )
    faster = make_recipe(schedule={"kind": "linear"}, optimizer={"lr": 2e-3}, run={"steps": 8})
    assert goes_on(found, faster, "schedule")[-1] == "the rate at step 6 is 0.00075 instead of 0.000375"


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path):
    """As commit 332f762 wrote it: without digests, and without the settings that came later."""
    write_tokenizer(tmp_path)
    path = folders.latest(STORED / "run-332f762")
    assert path is not None
    head = json.loads((path / "checkpoint.json").read_text())
    assert "identity" not in head
    assert "date" not in head["recipe"]["data"]
    recipe = load_recipe(
        STORED / "run-332f762/recipe.yaml", [f"data.tokenizer={tmp_path}", f"data.cache={tmp_path}/c"]
    )
    [said] = goes_on(checkpoint.read_origin(path), recipe)
    assert said.endswith("model, tokenizer and data were not compared")
    loaded = checkpoint.load(path, resolve(recipe))
    assert loaded.step == 3
    started = dict(starting_weights(resolve(recipe)))
    b = next(name for name in loaded.weights if name.endswith("lora_B.weight"))
    assert np.abs(loaded.weights[b][...]).max() > 0
    assert not next(w for p, w in started.items() if p.name == b)[...].any()
    # What its recipe says is compared as ever.
    with pytest.raises(RecipeError, match=r"schedule\.kind was"):
        goes_on(
            checkpoint.read_origin(path),
            recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"kind": "cosine"})}),
        )


def test_a_recipe_that_this_version_does_not_know_is_no_damage(made):
    _, found, _ = made()
    manifest = read_manifest(found.path)
    manifest.recipe["optimizer"]["nesterov"] = True
    manifest.write(found.path)
    with pytest.raises(WeightsError, match=r"does not know: optimizer\.nesterov: unknown key"):
        checkpoint.read_origin(found.path)


def test_whoever_reads_needs_the_model_not_the_data(
    made, make_recipe: Make, model_dirs: dict[str, Path], tmp_path: Path
):
    """eval and export load a checkpoint whatever the training data are now, but not beside another model."""
    directory = tmp_path / "m"
    shutil.copytree(model_dirs["plain"], directory)
    recipe, found, _ = made(model={"from": str(directory)})
    other = make_recipe(
        model={"from": str(directory)},
        data={"train": "nowhere.jsonl", "packing": True},
        optimizer={"lr": 1.0},
        run={"seed": 7},
    )
    checkpoint.load(found.path, resolve(other))
    other_weights(directory)
    with pytest.raises(UserError, match="the model's weights are not those"):
        checkpoint.load(found.path, resolve(recipe))
    other_config(directory)
    with pytest.raises(UserError, match="the model's settings"):
        checkpoint.load(found.path, resolve(recipe))
