"""TRL's SFTTrainer: the dict of its SFTConfig, or the YAML of `trl sft`, which names model, records and LoRA as well."""

from __future__ import annotations

from typing import Any

from trainspec.imports import peft
from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Only,
    Outcome,
    Question,
    Read,
    Refused,
    Same,
    Setting,
    Translated,
    idle,
    only_off,
    replaced,
)
from trainspec.imports.tool import Tool
from trainspec.imports.trainer import BESIDE, NUMBERS, OTHERS, bf16, dtype_of
from trainspec.imports.training import (
    NO_RECORDS,
    PRECISION,
    RECORDS,
    REMAT,
    SPECIAL_TOKEN,
    records,
    source,
    template,
)

SOURCE = "SFTConfig, trl f2cd577, transformers 5.23.0"
_MODEL_CONFIG, _SCRIPT = "ModelConfig, trl f2cd577", "ScriptArguments, trl f2cd577"


def method(value: Any, case: Case) -> Outcome:
    """LoRA with `use_peft`, DoRA with `use_dora` besides; without an adapter's file every weight is trained."""
    if case.has("adapter_config"):
        return NoEffect("the adapter's file says it")
    if not value:
        return Translated({"method.kind": "full"})
    return Translated({"method.kind": "dora" if case["use_dora"] else "lora"})


def is_peft(case: Case) -> bool:
    """Whether ModelConfig makes the adapter."""
    return bool(case["use_peft"]) and not case.has("adapter_config")


def target_modules(value: Any, case: Case) -> Outcome:
    """A list of one element is taken for a pattern by ModelConfig, or for all-linear; a name means the same both ways."""
    return peft.target_modules(value[0] if isinstance(value, list) and len(value) == 1 else value, case)


def data_set(value: Any, case: Case) -> Outcome:
    """A data set of the hub, or of a file, with its split."""
    if case["dataset_config"]:
        return Question(
            "--set data.train=FILE",
            "a data set's configuration cannot be named in a recipe; save its records",
        )
    split = case["dataset_train_split"]
    named = source(str(value))
    if split == "train":
        return Translated({"data.train": named})
    return (
        Translated({"data.train": f"{named}:{split}"}) if named.startswith("hub:") else records(value, case)
    )


def loss_on(value: Any, case: Case) -> Outcome:
    """Where the loss is taken: unless said, on the completion of prompt-completion records, and on all of others."""
    if case["assistant_only_loss"] is True or value is True:
        return Translated({"data.loss_on": "completion"})
    if value is False:
        return Translated({"data.loss_on": "all"})
    return Question(
        "--set data.loss_on=all",
        "completion_only_loss is not set: all for text and messages, completion for prompt and completion",
    )


def packing(value: Any, case: Case) -> Outcome:
    """Packing whose records do not see one another: best fit, with or without splitting."""
    strategy, packs = case["packing_strategy"], case.choice("data.packing", bool(value))
    if not packs:
        return Translated({"data.packing": False, "data.too_long": "cut"})
    if strategy not in ("bfd", "bfd_split", "bfd-requeue") and not case.chose("data.packing"):
        return Refused(f"packing by {strategy}", "--their packing_strategy=bfd")
    return Translated({"data.packing": True, "data.too_long": "cut" if strategy == "bfd" else "split"})


def max_length(value: Any, case: Case) -> Outcome:
    """Tokens of an example; without a limit a recipe has to say one."""
    if value is None:
        return Question("--set data.sequence_tokens=N", "max_length is null: examples have no limit there")
    return Translated({"data.sequence_tokens": value})


def text_field(value: Any, case: Case) -> Outcome:
    """The field of plain text."""
    if value == "text" or case.chose("data.columns") or case.choice("data.task", "text") != "text":
        return NoEffect(
            "the field `text` is that of plain text, there as here; with it give --set data.task=text"
        )
    return Translated({"data.task": "text", "data.columns": {"text": value}})


_TEMPLATE = By(template, "`data.chat_template`, where it is a file; else asked for", ("data.chat_template",))
_QUANTISED = "a model in fewer bits"
_UNQUANTISED = "--drop it: the model is then trained as it is"

# Where SFTConfig's defaults are not the Trainer's.
DEFAULTS = (
    Setting("learning_rate", Same("optimizer.lr"), 2e-5),
    Setting("gradient_checkpointing", REMAT, True),
    Setting("bf16", By(bf16, "`precision.policy`, `precision.reduce`", PRECISION), True),
)  # fmt: skip

METHOD = (
    Setting("use_peft", By(method, "`method.kind`: lora, dora, or full without it", ("method.kind",)), False, _MODEL_CONFIG),
    Setting("use_dora", Read("use_peft")),
    Setting("lora_r", Same("method.rank"), 16, _MODEL_CONFIG, is_peft),
    Setting("lora_alpha", Same("method.alpha"), 32, _MODEL_CONFIG, is_peft),
    Setting("lora_dropout", Same("method.dropout"), 0.05, _MODEL_CONFIG, is_peft),
    Setting("use_rslora", Same("method.rslora"), False, _MODEL_CONFIG, is_peft),
    Setting("lora_target_modules", By(target_modules, peft.TARGETS_RULE, ("method.targets",)), peft.DEFAULT_TARGETS, "PEFT, by the model's type", is_peft),
)  # fmt: skip

RECORDS_AND_LOSS = (
    Setting("dataset_name", By(data_set, "`data.train`: hub:NAME:SPLIT", ("data.train",)), NO_RECORDS),
    Setting("dataset_train_split", Read("dataset_name"), "train", _SCRIPT, lambda case: case.has("dataset_name")),
    Setting("dataset_config", Read("dataset_name")),
    Setting("dataset_text_field", By(text_field, "`data.task`, `data.columns`", ("data.task", "data.columns"))),
    Setting("max_length", By(max_length, "`data.sequence_tokens`", ("data.sequence_tokens",)), 1024, null_is_value=True, applies=lambda case: not case.has("max_seq_length")),
    Setting("max_seq_length", Same("data.sequence_tokens")),
    Setting("packing", By(packing, "`data.packing`, `data.too_long`", ("data.packing", "data.too_long")), False),
    Setting("packing_strategy", Read("packing"), "bfd"),
    Setting("completion_only_loss", By(loss_on, "`data.loss_on`; asked for where neither it nor `assistant_only_loss` says", ("data.loss_on",)), None),
    Setting("assistant_only_loss", Read("completion_only_loss")),
    Setting("chat_template", _TEMPLATE),
    Setting("chat_template_path", _TEMPLATE),
)  # fmt: skip

NOT_HERE = (
    *only_off(_QUANTISED, "load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", way_out=_UNQUANTISED),
    *idle("only a quantised model has it", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"),
    *only_off("weights trained whole beside the adapter", "lora_modules_to_save"),
    *only_off("adapted tensors that are no linear layer", "lora_target_parameters"),
    Setting("loss_type", Only("another loss", ("nll", "chunked_nll"))),
    Setting("truncation_mode", Only("examples cut at their start", ("keep_start",))),
    Setting("eos_token", SPECIAL_TOKEN),
    *only_off("data sets that are streamed", "dataset_streaming", way_out="--set run.steps=N, and --drop it"),
    *only_off("data prepared by a script", "dataset_kwargs.skip_prepare_dataset"),
    Setting("dataset_mixture.*", RECORDS),
    Setting("datasets.*", RECORDS),
    Setting("dataset_kwargs.*", RECORDS),
    Setting("dataset_test_split", Read("dataset_name")),
    Setting("model_revision", Only("another revision of the model", ("main",), "--set model.from=DIRECTORY with that revision, and --drop model_revision")),
    Setting("lora_task_type", Only("a model that writes no text", ("CAUSAL_LM",))),
    Setting("model_init_kwargs.dtype", dtype_of("model_init_kwargs.dtype")),
    Setting("model_init_kwargs.torch_dtype", dtype_of("model_init_kwargs.torch_dtype")),
    *idle("attention is exact whoever computes it", "model_init_kwargs.attn_implementation", "model_init_kwargs.use_cache"),
    *idle("no code of a repository is run", "trust_remote_code"),
    *idle("only mixtures of experts have it", "router_aux_loss_coef"),
    *idle("padding has no effect on numbers", "pad_to_multiple_of", "padding_free", "pad_token"),
    *idle("examples come in random order", "shuffle_dataset"),
    *idle("held-out examples are made as those of training", "eval_packing"),
    *idle("how records are read and cached", "dataset_num_proc", "ignore_bias_buffers"),
    *idle("where activations are kept", "activation_offloading"),
    *idle("empty, as if it were not there", "model_init_kwargs"),
    *idle("settings of the program, not of the training", "env", "env.*", "config"),
)  # fmt: skip

TRL = Tool(
    name="TRL's SFTTrainer",
    marks=(
        "max_length", "max_seq_length", "packing", "packing_strategy", "dataset_name", "dataset_mixture", "dataset_text_field",
        "completion_only_loss", "assistant_only_loss", "use_peft", "model_init_kwargs", "dataset_num_proc",
    ),
    settings=(*METHOD, *peft.SETTINGS, *replaced(NUMBERS, *DEFAULTS), *RECORDS_AND_LOSS, *NOT_HERE, *OTHERS),
    source=SOURCE,
    beside=BESIDE,
)  # fmt: skip
