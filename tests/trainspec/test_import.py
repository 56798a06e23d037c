"""`trainspec import`: published configurations of other tools, settings that it must not lose, defaults, mistakes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainspec.backends import BACKENDS
from trainspec.cli import main, parser
from trainspec.errors import PlanError, RecipeError
from trainspec.imports import Imported, import_configuration
from trainspec.imports.command import answers
from trainspec.imports.report import recipe_text
from trainspec.imports.settings import Idle, Only, Read
from trainspec.recipe import Recipe, load_recipe, recipe_from
from trainspec.recipe_file import read_mapping
from trainspec.runs.run import check_plan, resolve

HOME = Path(__file__).parent / "configurations"
KINDS = ("axolotl", "llamafactory", "trl")
PUBLISHED: dict[str, dict[str, Any]] = {
    f"{kind}/{name}": case
    for kind in KINDS
    for name, case in yaml.safe_load((HOME / f"{kind}.yaml").read_text()).items()
}


def files(name: str) -> list[Path]:
    kind = name.partition("/")[0]
    named = PUBLISHED[name].get("files")
    return [HOME / kind / file for file in named] if named else [HOME / f"{name}.yaml"]


def imported(paths: list[Path], options: str = "") -> Imported:
    args = parser().parse_args(["import", *map(str, paths), *shlex.split(options)])
    return import_configuration(args.files, answers(args), changes=args.changes, drops=args.drops)


def names(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every setting of a file, by dotted name: written apart from the importer's own."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from names(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                yield from names(item, f"{prefix}{key}.{i}.")
        else:
            yield f"{prefix}{key}"


def read(path: Path) -> dict[str, Any]:
    return read_mapping(path, advice="", wanted="")


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_ten_of_each_kind(kind: str):
    assert sum(name.startswith(f"{kind}/") for name in PUBLISHED) >= 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_accounted_for(name: str):
    result = imported(files(name))
    main_file, *beside = files(name)
    given = [n for n in names(read(main_file)) if n not in ("deepspeed", "adapter_config") or not beside]
    for path in beside:
        prefix = "adapter_config." if path.stem == "adapter_config" else "deepspeed."
        given += [f"{prefix}{n}" for n in names(read(path))]
    # A setting that is there and null is as if it were not there: it may be a default.
    lines = [line.name for line in result.lines if line.origin == "given" or line.name in given]
    assert sorted(lines) == sorted(given)
    assert [line.name for line in result.refused()] == PUBLISHED[name]["refused"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ways_out_lead_to_a_recipe(name: str, tmp_path: Path):
    case = PUBLISHED[name]
    result = imported(files(name), case["options"])
    recipe = result.recipe()
    assert {key: result.ours[key] for key in case["recipe"]} == case["recipe"]
    (tmp_path / "recipe.yaml").write_text(recipe_text(result), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    if "preset" in case:
        assert runs_somewhere(recipe, case["preset"])


def runs_somewhere(recipe: Recipe, preset: str) -> bool:
    """Whether a backend runs the recipe, with a preset in place of a model of the hub."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree["model"] = {"from": f"preset:{preset}", "weights": "random"}
    run = resolve(recipe_from(tree))
    for backend in BACKENDS.values():
        try:
            check_plan(run, backend)
            return True
        except PlanError:
            continue
    return False


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_invented_setting_is_refused_in_every_file(name: str, tmp_path: Path):
    """The control of the tests above: nothing is dropped because nobody knows it."""
    for invented in files(name):
        paths = []
        for path in files(name):
            tree = read(path) | ({"invented_setting": None} if path == invented else {})
            paths.append(tmp_path / path.name)
            paths[-1].write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))
        refused = {
            line.name.rpartition(".")[2] for line in imported(paths, PUBLISHED[name]["options"]).refused()
        }
        assert refused == {"invented_setting"}


def test_the_recipe_says_everything_that_decides_numbers():
    """Also where it is the tool's default, as ours may be another."""
    for name, case in PUBLISHED.items():
        ours = imported(files(name), case["options"]).ours
        for key in (
            "model.from", "method.kind", "data.train", "data.sequence_tokens", "data.packing", "data.loss_on",
            "batch.global_examples", "batch.accumulation", "precision.policy", "precision.reduce", "plan.remat",
            "optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm",
            "schedule.kind", "run.steps", "run.seed",
        ):  # fmt: skip
            assert key in ours, (name, key)
        assert "schedule.warmup_steps" in ours or "schedule.warmup_ratio" in ours, name
        if ours["method.kind"] == "lora":
            assert {
                f"method.{key}" for key in ("rank", "alpha", "dropout", "rslora", "targets")
            } <= ours.keys(), name


TRL_FILE = {
    "model_name_or_path": "org/model",
    "dataset_name": "r.jsonl",
    "assistant_only_loss": True,
    "max_steps": 10,
}
ON_ONE = "--devices 1"


def recipe_of(
    tmp_path: Path, options: str = ON_ONE, beside: dict[str, Any] | None = None, **settings: Any
) -> Imported:
    """What becomes of a small TRL file with these settings, and of files beside it by name."""
    paths = [tmp_path / "training_args.json", *(tmp_path / f"{name}.json" for name in beside or {})]
    for path, tree in zip(paths, [TRL_FILE | settings, *(beside or {}).values()], strict=True):
        path.write_text(json.dumps(tree))
    return imported(paths, options)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"warmup_steps": 0.1}, {"schedule.warmup_ratio": 0.1}),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, {"schedule.warmup_steps": 5}),
        ({"warmup_ratio": 0.1}, {"schedule.warmup_ratio": 0.1}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, {"schedule.kind": "constant", "schedule.warmup_steps": 0}),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, {"schedule.kind": "constant", "schedule.warmup_steps": 5}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-3, "lr_scheduler_kwargs": {"min_lr": 1e-4}},
         {"schedule.kind": "cosine", "schedule.final_ratio": pytest.approx(0.1)}),
        ({"max_grad_norm": 0}, {"optimizer.clip_norm": None}),
        ({"adam_beta2": 0.95}, {"optimizer.betas": [0.9, 0.95]}),
        ({"fp16": False, "bf16": False}, {"precision.policy": "fp32", "precision.reduce": "fp32"}),
        ({"bf16": False, "gradient_checkpointing": False}, {"precision.policy": "fp32", "plan.remat": "none"}),
        ({"packing": True, "packing_strategy": "bfd_split"}, {"data.packing": True, "data.too_long": "split"}),
        ({"use_peft": True, "use_dora": True, "lora_r": 4}, {"method.kind": "dora", "method.rank": 4, "method.alpha": 32}),
        ({"lora_r": 4}, {"method.kind": "full"}),
        ({"use_peft": True}, {"method.targets": ["q_proj", "v_proj"]}),
        ({"use_peft": True, "model_name_or_path": "THUDM/chatglm2-6b"}, {"method.targets": ["query_key_value"]}),
        ({"use_peft": True, "model_name_or_path": "THUDM/chatglm2-6b", "lora_target_modules": ["q_proj"]}, {"method.targets": ["q_proj"]}),
        ({"assistant_only_loss": False, "completion_only_loss": False}, {"data.loss_on": "all"}),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, {"run.eval_every_steps": 3}),
    ],
)  # fmt: skip
def test_a_setting_is_translated(tmp_path: Path, settings: dict[str, Any], ours: dict[str, Any]):
    result = recipe_of(tmp_path, **settings)
    result.recipe()
    assert {key: result.ours.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("options", "settings", "ours"),
    [
        ("--devices 4", {"bf16": False}, {"plan.data": 4, "plan.fsdp": 1, "plan.shards": "nothing"}),
        ("--devices 4", {}, {"plan.data": 1, "plan.fsdp": 4, "plan.shards": "optimizer"}),
        ("--devices 4", {"fsdp": "shard_grad_op"}, {"plan.fsdp": 4, "plan.shards": "gradients", "precision.reduce": "bf16"}),
        # 7 examples in updates of 4: two an epoch, where passes over the examples would make 6 of three epochs
        ("--devices 4 --examples 7", {"max_steps": -1, "per_device_train_batch_size": 1, "num_train_epochs": 3}, {"run.steps": 6}),
        ("--devices 4 --examples 9", {"max_steps": -1, "per_device_train_batch_size": 1, "num_train_epochs": 3}, {"run.steps": 9}),
        ("--devices 4 --examples 9", {"max_steps": -1, "per_device_train_batch_size": 1, "num_train_epochs": 3, "dataloader_drop_last": True}, {"run.steps": 6}),
        ("--devices 4 --set run.epochs=3", {"max_steps": -1}, {"run.epochs": 3}),
        ("--devices 4 --set data.heldout=x.jsonl", {"load_best_model_at_end": True}, {"checkpoint.keep_best": 1}),
        # one of the two settings that `packing` decides
        ("--devices 4 --set data.too_long=skip", {}, {"data.packing": False, "data.too_long": "skip"}),
    ],
)  # fmt: skip
def test_an_answer_is_used(tmp_path: Path, options: str, settings: dict[str, Any], ours: dict[str, Any]):
    result = recipe_of(tmp_path, options, **settings)
    result.recipe()
    assert {key: result.ours.get(key) for key in ours} == ours


def test_auto_is_what_the_trainer_says_and_another_value_is_refused(tmp_path: Path):
    zero = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": "auto"},
    }
    result = recipe_of(tmp_path, "--devices 2", {"ds": zero})
    assert result.recipe().plan.shards == "params"
    for wrong in ({"gradient_clipping": 0.5}, {"bf16": {"enabled": False}}, {"train_batch_size": 3}, {"gradient_accumulation_steps": 2},
                  {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": "auto", "eps": "auto", "weight_decay": "auto"}}},
                  {"optimizer": {"type": "AdamW", "params": {}}}, {"optimizer": {"type": "Lamb"}}, {"zero_optimization": {"stage": 4}},
                  {"data_types": {"grad_accum_dtype": "fp16"}}):  # fmt: skip
        with pytest.raises(RecipeError, match="refused: deepspeed"):
            recipe_of(tmp_path, "--devices 2", {"ds": zero | wrong}).recipe()
    summed = recipe_of(tmp_path, "--devices 2", {"ds": zero | {"data_types": {"grad_accum_dtype": "fp32"}}})
    assert (result.ours["precision.reduce"], summed.ours["precision.reduce"]) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("adapter", "ours"),
    [
        ({"peft_type": "LORA"}, {"method.rank": 8, "method.alpha": 8, "method.dropout": 0.0}),
        ({"peft_type": "LORA", "use_dora": True, "target_modules": "all-linear"}, {"method.kind": "dora", "method.targets": "all-linear"}),
        ({"peft_type": "LORA", "base_model_name_or_path": "./chatglm2-6b"}, {"method.targets": ["query_key_value"]}),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
         {"method.kind": "prefix", "method.virtual_tokens": 5, "method.projection": True, "method.hidden": 16}),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say:"},
         {"method.kind": "prompt", "method.init": "text", "method.text": "Say:"}),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1},
         {"method.kind": "ptuning", "method.encoder": "lstm", "method.dropout": 0.1}),
    ],
)  # fmt: skip
def test_an_adapters_file_says_the_method(tmp_path: Path, adapter: dict[str, Any], ours: dict[str, Any]):
    result = recipe_of(tmp_path, ON_ONE, {"adapter_config": adapter})
    result.recipe()
    assert {key: result.ours.get(key) for key in ours} == ours
    found = imported([tmp_path / "training_args.json"], ON_ONE)  # beside the arguments, and not named
    assert found.ours == result.ours
    with pytest.raises(RecipeError, match=r"adapter_config\.modules_to_save: weights trained whole"):
        recipe_of(tmp_path, ON_ONE, {"adapter_config": adapter | {"modules_to_save": ["score"]}}).recipe()


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        ({"use_peft": True, "use_dora": True, "weight_decay": 0.1}, ["weight_decay"]),
        ({"use_peft": True, "weight_decay": 0.1}, []),
        ({"torch_dtype": "bfloat16"}, ["torch_dtype"]),
        ({"torch_dtype": "bfloat16", "use_peft": True}, []),
        ({"tf32": True, "bf16": False}, ["tf32"]),
        ({"group_by_length": True}, ["group_by_length"]),
        ({"optim": "paged_adamw_32bit", "weight_decay": 0.1}, ["optim"]),
        ({"optim": "paged_adamw_32bit"}, []),
    ],
)
def test_what_a_recipe_cannot_say_is_named(tmp_path: Path, settings: dict[str, Any], differing: list[str]):
    assert [line.name for line in recipe_of(tmp_path, **settings).differences()] == differing


GOOD = "model_name_or_path: m\ndataset_name: r.jsonl\nassistant_only_loss: true\nmax_steps: 10\n"
MISTAKES = {
    "no such file": ("missing.yaml", None, "", "No such file"),
    "no yaml": ("a.yaml", "a: [", "", "not YAML"),
    "no json": ("a.json", "{", "", "not JSON"),
    "a list": ("a.yaml", "[1]", "", "not a mapping of settings"),
    "a list of json": ("a.json", "[1]", "", "not a mapping of settings"),
    "nothing known": ("a.yaml", "colour: red", "", "no configuration that is known here"),
    "a recipe": ("a.yaml", "model: {from: preset:tiny}", "", "no configuration that is known here"),
    "an adapter alone": ("a.json", '{"peft_type": "LORA"}', "", "goes with a configuration"),
    "a file that is not here": ("a.yaml", GOOD + "deepspeed: ds.json", "", "deepspeed: ds.json is not here; give it as a further file"),
    "an unknown setting": ("a.yaml", GOOD + "learning_rat: 1", ON_ONE, "learning_rat: unknown; did you mean learning_rate?; --drop learning_rat"),
    "an unknown setting without a value": ("a.yaml", GOOD + "colour:", ON_ONE, "colour: unknown"),
    "no devices": ("a.yaml", GOOD, "", "give --devices N (per_device_train_batch_size=8 counts"),
    "no examples": ("a.yaml", GOOD.replace("10", "-1"), ON_ONE, "give --examples N (the updates of num_train_epochs=3.0 depend"),
    "devices below one": ("a.yaml", GOOD, "--devices 0", "--devices 0: must be 1 or more"),
    "text for a number": ("a.yaml", GOOD + "learning_rate: fast", ON_ONE, "optimizer.lr: must be a number"),
    "text for a count": ("a.yaml", GOOD + "per_device_train_batch_size: many", ON_ONE, "per_device_train_batch_size: many is not a number"),
    "no accumulation": ("a.yaml", GOOD + "gradient_accumulation_steps: 0", ON_ONE, "gradient_accumulation_steps: 0 is below 1"),
    "a section": ("a.yaml", GOOD, "--devices 1 --set model=m", "--set model: is a section"),
    "no setting of ours": ("a.yaml", GOOD, "--devices 1 --set model.colour=red", "model.colour: unknown key"),
    "nothing to drop": ("a.yaml", GOOD, "--devices 1 --drop colour", "--drop colour:"),
    "no value of theirs": ("a.yaml", GOOD, "--devices 1 --their packing", "--their 'packing': write KEY=VALUE"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, text, options, wanted = MISTAKES[name]
    if text is not None:
        (tmp_path / file).write_text(text)
    out = tmp_path / "recipe.yaml"
    assert main(["import", str(tmp_path / file), "--out", str(out), *shlex.split(options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trainspec: ")
    assert wanted in line
    assert not out.exists()


def test_two_configurations_are_refused():
    with pytest.raises(RecipeError, match="a second configuration"):
        imported([HOME / "axolotl/llama-3-lora-8b.yaml", HOME / "trl/handbook-smollm2.yaml"])


def tool_recipe(tmp_path: Path, text: str, options: str) -> Imported:
    (tmp_path / "theirs.yaml").write_text(text)
    return imported([tmp_path / "theirs.yaml"], options)


AXOLOTL = (
    "base_model: org/model\nlearning_rate: 1.0e-4\nsequence_len: 64\nbf16: true\nmax_steps: 10\n"
    "datasets: [{path: org/records, type: chat_template}]\n"
)
AXOLOTL_LORA = f"{AXOLOTL}adapter: lora\nlora_r: 8\nlora_alpha: 16\n"
LLAMAFACTORY = "model_name_or_path: org/model\nstage: sft\nfinetuning_type: lora\ndataset: d\nlearning_rate: 1.0e-4\nmax_steps: 10\n"
EPOCHS = AXOLOTL.replace("max_steps: 10\n", "num_epochs: 2\n")
CHATS = AXOLOTL.replace("template}", "template, message_property_mappings: {role: from, content: value}}")
OF_LLAMAFACTORY = "--devices 1 --set data.train=r.jsonl"


@pytest.mark.parametrize(
    ("text", "options", "ours"),
    [
        # One of the settings that a rule decides is chosen: the others are the tool's still.
        (AXOLOTL, "--devices 1 --set precision.reduce=fp32", {"precision.policy": "bf16", "precision.reduce": "fp32"}),
        (AXOLOTL, "--devices 1 --set precision.policy=fp32", {"precision.policy": "fp32", "precision.reduce": "fp32"}),
        (AXOLOTL, "--devices 1 --set precision.policy=fp64", {"precision.reduce": "fp64"}),
        (AXOLOTL, "--devices 8 --set plan.shards=params", {"plan.data": 1, "plan.fsdp": 8, "plan.shards": "params"}),
        (AXOLOTL, "--devices 8 --set plan.shards=nothing", {"plan.data": 8, "plan.fsdp": 1}),
        (AXOLOTL, "--devices 8 --set plan.data=2", {"plan.fsdp": 4, "plan.shards": "optimizer"}),
        (AXOLOTL, "--devices 8 --set plan.data=8", {"plan.fsdp": 1, "plan.shards": "nothing"}),
        (AXOLOTL, "--devices 8 --set plan.fsdp=4", {"plan.data": 2, "plan.shards": "optimizer"}),
        (AXOLOTL, "--devices 8 --set plan.tensor=2", {"plan.data": 1, "plan.fsdp": 4}),
        (f"{AXOLOTL}fsdp: hybrid_shard", "--devices 8 --set plan.data=2 --set plan.fsdp=4", {"plan.shards": "params"}),
        (AXOLOTL, "--devices 1 --set schedule.final_ratio=0.1", {"schedule.kind": "cosine", "schedule.final_ratio": 0.1}),
        (f"{AXOLOTL}lr_scheduler: polynomial", "--devices 1 --set schedule.kind=linear", {"schedule.kind": "linear"}),
        (f"{AXOLOTL}warmup_steps: 5", "--devices 1 --set schedule.warmup_ratio=0.1", {"schedule.warmup_steps": None}),
        (GOOD, "--devices 1 --set data.packing=true", {"data.packing": True, "data.too_long": "cut"}),
        (f"{GOOD}packing: true\npacking_strategy: bfd_split", "--devices 1 --set data.packing=false", {"data.too_long": "cut"}),
        (f"{GOOD}packing: true\npacking_strategy: wrapped", "--devices 1 --set data.packing=true", {"data.too_long": "split"}),
        (f"{GOOD}dataset_text_field: body", "--devices 1 --set data.task=text", {"data.columns": {"text": "body"}}),
        (f"{GOOD}dataset_text_field: body", "--devices 1 --set data.task=conversation", {"data.columns": None}),
        (LLAMAFACTORY, f"{OF_LLAMAFACTORY} --set data.packing=true", {"data.packing": True, "data.too_long": "cut"}),
        (f"{LLAMAFACTORY}packing: true", f"{OF_LLAMAFACTORY} --set data.packing=false", {"data.too_long": "cut"}),
        # The types of sums and weights.
        (f"{GOOD}fsdp_config: {{version: 2}}", ON_ONE, {"precision.reduce": "fp32"}),
        (f"{GOOD}fsdp: full_shard", ON_ONE, {"precision.reduce": "bf16"}),
        (f"{AXOLOTL_LORA}fsdp_config: {{fsdp_version: 2}}", ON_ONE, {"precision.reduce": "bf16"}),
        (AXOLOTL.replace("bf16: true", "bf16:"), ON_ONE, {"precision.policy": "fp32"}),
        (AXOLOTL.replace("bf16: true", "bf16:\nbfloat16: true"), ON_ONE, {"precision.policy": "bf16"}),
        (AXOLOTL.replace("bf16: true\n", ""), ON_ONE, {"precision.policy": "bf16"}),
        # Records.
        (AXOLOTL.replace("chat_template", "chat_template, split: 'train[:9]'"), ON_ONE, {"data.train": "hub:org/records:train[:9]"}),
        (AXOLOTL.replace("org/records", "r.jsonl, split: train"), ON_ONE, {"data.train": "r.jsonl"}),
        (CHATS, ON_ONE, {"data.columns": {"conversations": "messages"}}),
        (CHATS.replace("from, content: value", "role, content: content"), ON_ONE, {"data.columns": None}),
        (CHATS.replace("path", "field_messages: turns, path"), ON_ONE, {"data.columns": {"conversations": "turns"}}),
        (CHATS.replace("path", "field_messages: conversations, path"), ON_ONE, {"data.columns": None}),
        # Targets.
        (f"{AXOLOTL_LORA}lora_target_linear: true\nlora_target_modules: [q_proj]", ON_ONE, {"method.targets": "all-linear"}),
        (f"{AXOLOTL_LORA}lora_target_modules: [q_proj, lm_head]", ON_ONE, {"method.targets": ["q_proj", "lm_head"]}),
        (f"{GOOD}use_peft: true\nlora_target_modules: [all-linear]", ON_ONE, {"method.targets": "all-linear"}),
        (f"{GOOD}use_peft: true\nlora_target_modules: [q_proj]", ON_ONE, {"method.targets": ["q_proj"]}),
        (f"{GOOD}use_peft: true\nlora_target_modules: ['.*_proj']", ON_ONE, {"method.targets": ".*_proj"}),
    ],
)  # fmt: skip
def test_what_a_file_says_of_several_settings(tmp_path: Path, text: str, options: str, ours: dict[str, Any]):
    result = tool_recipe(tmp_path, text, options)
    result.recipe()
    assert {key: result.ours.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        # What a choice does not concern is refused still.
        (f"{AXOLOTL}lr_scheduler: polynomial", "--devices 1 --set schedule.final_ratio=0.1", "lr_scheduler: the schedule polynomial"),
        (f"{AXOLOTL}fsdp: hybrid_shard", "--devices 8", "fsdp: FSDP's hybrid_shard"),
        (f"{GOOD}packing: true\npacking_strategy: wrapped", "--devices 1 --set data.too_long=skip", "packing: packing by wrapped"),
        (f"{LLAMAFACTORY}packing: true", f"{OF_LLAMAFACTORY} --set data.too_long=skip", "packing: packing where records"),
        (EPOCHS, "--devices 1 --examples 9 --set batch.global_examples=many", "num_epochs: many is not a number"),
        (f"{EPOCHS}sample_packing: true\nsample_packing_eff_est: 0.9", "--devices 1 --examples 9", "--drop sample_packing_eff_est, and --set run.steps=N"),
        (AXOLOTL.replace("org/records", "r.jsonl, split: 'train[:9]'"), ON_ONE, "give --set data.train=FILE"),
        (f"{GOOD}dataset_train_split: 'train[:9]'", ON_ONE, "give --set data.train=FILE"),
        (CHATS.replace("from", "speaker"), ON_ONE, "give --set data.train=FILE"),
        (CHATS.replace("from", "[from]"), ON_ONE, "give --set data.train=FILE"),
        (CHATS.replace("role: from", "role: from, tools: calls"), ON_ONE, "give --set data.train=FILE"),
        (f"{AXOLOTL_LORA}lora_target_linear: true\nlora_target_modules: [lm_head]", ON_ONE, "lora_target_modules: targets beside every linear layer"),
        (f"{GOOD}lr_scheduler_type: cosine\nlr_scheduler_kwargs: {{min_lr: 1.0e-5}}", ON_ONE, "lr_scheduler_kwargs.min_lr: min_lr without"),
        (f"{GOOD}use_peft: true", f"{ON_ONE} --set model.from=hub:HuggingFaceTB/SmolLM3-3B", "--their lora_target_modules=[q_proj,v_proj]"),
        (f"{GOOD}lr_scheduler_kwargs: {{min_lr_rate: 0.1}}", ON_ONE, "lr_scheduler_kwargs.min_lr_rate: min_lr without"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_or_asked_for(tmp_path: Path, text: str, options: str, wanted: str):
    with pytest.raises(RecipeError) as error:
        tool_recipe(tmp_path, text, options).recipe()
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("settings", "options", "steps"),
    [
        # Passes of 2 examples, of which an update has 2: five passes are three updates, 11 // 4 would be 2.
        ("per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\ndataloader_drop_last: true\nnum_train_epochs: 1", "--devices 2 --examples 11", 3),
        ("per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\ndataloader_drop_last: true\nnum_train_epochs: 1", "--devices 2 --examples 9", 2),
        ("per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\nnum_train_epochs: 1", "--devices 2 --examples 9", 3),
        ("per_device_train_batch_size: 8\ndataloader_drop_last: true\nnum_train_epochs: 3", "--devices 1 --examples 7", 3),
        ("per_device_train_batch_size: 1\nnum_train_epochs: 1.1", "--devices 1 --examples 100", 111),
    ],
)  # fmt: skip
def test_the_trainers_updates_are_counted_as_it_does(tmp_path: Path, settings: str, options: str, steps: int):
    text = GOOD.replace("max_steps: 10\n", settings)
    assert tool_recipe(tmp_path, text, options).ours["run.steps"] == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ("num_epochs: 1.1", 111),
        ("num_epochs: 1.1\nsample_packing: true", 110),
        ("num_epochs: 2\nsample_packing: true\ndataloader_drop_last: true", 198),
        ("num_epochs: 1.5\nsample_packing: true\ndataloader_drop_last: true", 148),
        ("num_epochs: 2\ndataloader_drop_last: true", 200),
        ("num_epochs: 2\nsample_packing_eff_est: 0.9", 200),
    ],
)
def test_axolotls_updates_are_counted_as_it_does(tmp_path: Path, settings: str, steps: int):
    text = AXOLOTL.replace("max_steps: 10\n", f"{settings}\n")
    assert tool_recipe(tmp_path, text, "--devices 1 --examples 100").ours["run.steps"] == steps


def test_what_deepspeeds_file_leaves_out_is_deepspeeds_own(tmp_path: Path):
    """Only `auto` is what the training arguments say: without the key DeepSpeed clips at 1 and accelerate does not accumulate."""
    zero = {"zero_optimization": {"stage": 2}}
    recipe_of(tmp_path, ON_ONE, {"ds": zero}).recipe()
    for name, key, value in (
        ("max_grad_norm", "gradient_clipping", 0.3),
        ("max_grad_norm", "gradient_clipping", 0),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", 4),
    ):
        recipe_of(tmp_path, ON_ONE, {"ds": zero | {key: "auto"}}, **{name: value}).recipe()
        with pytest.raises(RecipeError, match=rf"refused: deepspeed\.{key}: 1"):
            recipe_of(tmp_path, ON_ONE, {"ds": zero}, **{name: value}).recipe()
        recipe_of(tmp_path, f"{ON_ONE} --their deepspeed.{key}=auto", {"ds": zero}, **{name: value}).recipe()
    (tmp_path / "ds.json").unlink()
    assert recipe_of(tmp_path, ON_ONE, max_grad_norm=0.3).ours["optimizer.clip_norm"] == 0.3


def test_a_chosen_batch_takes_the_place_of_deepspeeds(tmp_path: Path):
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 8}
    chosen = recipe_of(tmp_path, f"{ON_ONE} --set batch.global_examples=64", {"ds": zero})
    assert chosen.recipe().batch.global_examples == 64
    with pytest.raises(RecipeError, match="refused: deepspeed"):
        recipe_of(tmp_path, ON_ONE, {"ds": zero}, per_device_train_batch_size=64).recipe()


@pytest.mark.parametrize(
    ("settings", "options", "differs"),
    [
        ("", "", True),
        ("bf16: false", "", True),
        ("bf16: true", "", False),
        ("finetuning_type: full", "", False),
        ("", "--set precision.policy=fp32", False),
    ],
)
def test_a_frozen_model_without_bf16_is_named(tmp_path: Path, settings: str, options: str, differs: bool):
    text = LLAMAFACTORY.replace("finetuning_type: lora\n", "") + settings
    result = tool_recipe(tmp_path, text, f"{OF_LLAMAFACTORY} {options}")
    result.recipe()
    assert ("bf16" in [line.name for line in result.differences()]) == differs


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("task_type", "CAUSAL_LM", "SEQ_CLS"), ("revision", "main", "v2")]
)
def test_an_adapter_of_another_task_or_revision_is_refused(tmp_path: Path, name: str, good: str, bad: str):
    for value in (good, None):
        recipe_of(tmp_path, ON_ONE, {"adapter_config": {"peft_type": "LORA", name: value}}).recipe()
    with pytest.raises(RecipeError, match=rf"refused: adapter_config\.{name}"):
        recipe_of(tmp_path, ON_ONE, {"adapter_config": {"peft_type": "LORA", name: bad}}).recipe()


ODD = ("x", -1, 0, 1e308, True, [], ["x"], {}, None, "auto")
SAMPLES = (
    "trl/fastchat-lora",
    "trl/peft-sft-deepspeed",
    "axolotl/llama-2-fft_optimized",
    "llamafactory/qwen3_lora_sft_ds3",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SAMPLES[1:] else []) for name in SAMPLES]
)
def test_an_odd_value_is_a_recipe_or_one_line(name: str):
    """Each setting that is given or read gets each odd value: none ends in a stack."""
    sample = imported(files(name), PUBLISHED[name]["options"])
    args = parser().parse_args(["import", "", *shlex.split(PUBLISHED[name]["options"])])
    configuration, ended = sample.configuration, {"recipe": 0, "line": 0}
    read = [
        s.name.replace("*", "0")
        for s in configuration.tool.settings
        if not isinstance(s.rule, Idle | Only | Read)
    ]
    for key in {*configuration.given, *read}:
        for value in ODD:
            lines, case = configuration.tool.translate(configuration.given | {key: value}, answers(args))
            try:
                Imported(configuration, lines, case.ours, sample.chosen).recipe()
                ended["recipe"] += 1
            except RecipeError as error:
                ended["line"] += 1
                assert len(str(error).splitlines()) == 1, error  # noqa: PT017
    assert min(ended.values()) > 50


def test_the_console_has_the_table_and_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Without --out the whole output is the recipe: the table stands in comments."""
    name = "llamafactory/qwen3_lora_sft"
    assert main(["import", *map(str, files(name)), *shlex.split(PUBLISHED[name]["options"])]) == 0
    printed = capsys.readouterr().out
    assert recipe_from(yaml.safe_load(printed)) == imported(files(name), PUBLISHED[name]["options"]).recipe()
    assert "# lora_alpha" in printed
    assert "by default  method.alpha=16" in printed
    out = tmp_path / "recipe.yaml"
    assert (
        main(["import", *map(str, files(name)), *shlex.split(PUBLISHED[name]["options"]), "--out", str(out)])
        == 0
    )
    assert load_recipe(out) == recipe_from(yaml.safe_load(printed))
