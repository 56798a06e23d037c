"""PEFT's `adapter_config.json`, as a file beside a Trainer's arguments."""

from __future__ import annotations

from typing import Any

from trainspec.families import FAMILIES
from trainspec.families.family import Family
from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Only,
    Outcome,
    Read,
    Refused,
    Same,
    Setting,
    Translated,
    idle,
    only_off,
    within,
)
from trainspec.methods import LoRA

SOURCE = "PEFT 0.21.2"
MARKS = ("peft_type",)
# PEFT's types -> kinds of ours.
KINDS = {"LORA": "lora", "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning", "PREFIX_TUNING": "prefix"}
TYPE = "adapter_config.peft_type"
# What PEFT adapts of most models where no target is named; of others a family says it.
DEFAULT_TARGETS = list(LoRA().targets)
MODEL_NAMES = ("model_name_or_path", "adapter_config.base_model_name_or_path")
TARGETS = ("adapter_config.target_modules", "lora_target_modules")
TARGETS_RULE = (
    "`method.targets`; where none is named, PEFT's for the family that the model's name says: `query_key_value` of ChatGLM2; "
    "of SmolLM3 and GLM it has none, and they are asked for"
)


def kind(value: Any, case: Case) -> Outcome:
    """The method, of which DoRA is a kind of its own here."""
    if value not in tuple(KINDS):
        return Refused(f"PEFT's {value}", f"one of {', '.join(KINDS)}")
    dora = value == "LORA" and case["adapter_config.use_dora"]
    return Translated({"method.kind": "dora" if dora else KINDS[value]})


def is_type(*types: str) -> Any:
    """Whether the adapter is one of these."""
    return lambda case: case[TYPE] in types


def targets(value: Any) -> Any:
    """Targets as a recipe writes them: one name is a list of one, a pattern stays text."""
    if value is None:
        return DEFAULT_TARGETS
    if isinstance(value, str) and value != "all-linear" and value.isidentifier():
        return [value]
    return value


def target_modules(value: Any, case: Case) -> Outcome:
    """`method.targets`, with PEFT's own choice where there are none."""
    if any(case.has(name) for name in TARGETS):
        return Translated({"method.targets": targets(value)})
    names = [case.choice("model.from", ""), *(case[name] for name in MODEL_NAMES)]
    family = _family_of(" ".join(str(name) for name in names if name).lower())
    if family is None:
        return Translated({"method.targets": DEFAULT_TARGETS})
    if family.peft_targets is None:
        name = TARGETS[0] if case.has("adapter_config") else TARGETS[1]
        why = f"LoRA without targets, as PEFT has none for {family.title}"
        return Refused(why, f"--their {name}=[{','.join(DEFAULT_TARGETS)}]")
    return Translated({"method.targets": list(family.peft_targets)})


def _family_of(model: str) -> Family | None:
    """The family whose type is in a model's name; of several (chatglm, glm) that with the longest."""
    found = [family for family in FAMILIES.values() if family.model_type in model]
    return max(found, key=lambda family: len(family.model_type), default=None)


def start(value: Any, case: Case) -> Outcome:
    """How A and B start."""
    if value in (True, None):
        return Translated(note="A uniform and B zero, as here")
    return Refused(f"LoRA started by {value}", "--their adapter_config.init_lora_weights=true")


def prompt_start(value: Any, case: Case) -> Outcome:
    """How a prompt starts; PEFT's `RANDOM` is ours."""
    if value not in ("RANDOM", "TEXT"):
        return Refused(f"a prompt that starts as {value}", "RANDOM or TEXT")
    return Translated({"method.init": value.lower()})


def encoder(value: Any, case: Case) -> Outcome:
    """The encoder of P-tuning."""
    return Translated({"method.encoder": str(value).lower()})


def encoder_dropout(value: Any, case: Case) -> Outcome:
    """PEFT's MLP has no dropout, whatever it says."""
    if case["adapter_config.encoder_reparameterization_type"] != "LSTM":
        return NoEffect("only the LSTM has dropout, there as here")
    return Translated({"method.dropout": value})


def hidden(value: Any, case: Case) -> Outcome:
    """The width of the encoder; without a projection a prefix has none."""
    if case[TYPE] == "PREFIX_TUNING" and not case["adapter_config.prefix_projection"]:
        return NoEffect("there is no projection")
    return Translated({"method.hidden": value})


_LORA, _PROMPT = is_type("LORA"), is_type("PROMPT_TUNING")
_ENCODER, _PREFIX = is_type("P_TUNING"), is_type("PREFIX_TUNING")
_VIRTUAL = is_type("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_OF_MODEL = "sizes that the model gives"

SETTINGS = within(
    "adapter_config",
    (
        Setting(
            "peft_type", By(kind, "`method.kind`: lora, dora, prompt, ptuning, prefix", ("method.kind",))
        ),
        Setting("r", Same("method.rank"), 8, "LoraConfig", _LORA),
        Setting("lora_alpha", Same("method.alpha"), 8, "LoraConfig", _LORA),
        Setting("lora_dropout", Same("method.dropout"), 0.0, "LoraConfig", _LORA),
        Setting("use_rslora", Same("method.rslora"), False, "LoraConfig", _LORA),
        Setting("use_dora", Read(TYPE)),
        Setting(
            "target_modules",
            By(target_modules, TARGETS_RULE, ("method.targets",)),
            DEFAULT_TARGETS,
            "PEFT, by the model's type",
            _LORA,
        ),
        Setting("init_lora_weights", By(start, "as here where true; else refused")),
        Setting("bias", Only("trained biases", ("none",))),
        *only_off(
            "targets that are left out", "exclude_modules", way_out="a regular expression as target_modules"
        ),
        *only_off("weights trained whole beside the adapter", "modules_to_save"),
        *only_off("single tokens trained", "trainable_token_indices"),
        *only_off(
            "layers that are chosen by number",
            "layers_to_transform",
            "layers_pattern",
            way_out="a regular expression as target_modules",
        ),
        *only_off("ranks of their own for some targets", "rank_pattern", "alpha_pattern"),
        *only_off("adapted tensors that are no linear layer", "target_parameters"),
        *only_off("layers repeated", "layer_replication"),
        *only_off("a bias of the adapter", "lora_bias"),
        *only_off("weights stored the other way round", "fan_in_fan_out"),
        *only_off(
            "another start or form of LoRA",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ),
        *idle("only QALoRA has groups", "qalora_group_size"),
        *idle("only Megatron's layers have it", "megatron_config", "megatron_core"),
        *idle(
            "how an adapter is loaded and written",
            "runtime_config.*",
            "runtime_config",
            "ensure_weight_tying",
            "inference_mode",
            "auto_mapping",
            "peft_version",
        ),
        Setting("task_type", Only("a model that writes no text", ("CAUSAL_LM",))),
        Setting("revision", Only("another revision of the model", ("main",))),
        *idle("model.from says it", "base_model_name_or_path"),
        Setting("num_virtual_tokens", Same("method.virtual_tokens"), applies=_VIRTUAL),
        Setting(
            "prompt_tuning_init",
            By(prompt_start, "`method.init`: random or text", ("method.init",)),
            "RANDOM",
            "PromptTuningConfig",
            _PROMPT,
        ),
        Setting(
            "prompt_tuning_init_text",
            Same("method.text"),
            applies=lambda case: case["adapter_config.prompt_tuning_init"] == "TEXT",
        ),
        Setting(
            "encoder_reparameterization_type",
            By(encoder, "`method.encoder`", ("method.encoder",)),
            "MLP",
            "PromptEncoderConfig",
            _ENCODER,
        ),
        Setting(
            "encoder_hidden_size",
            By(hidden, "`method.hidden`", ("method.hidden",)),
            applies=is_type("P_TUNING", "PREFIX_TUNING"),
        ),
        Setting("encoder_num_layers", Only("an encoder of other than two layers", (2,))),
        Setting(
            "encoder_dropout",
            By(encoder_dropout, "`method.dropout` of the LSTM", ("method.dropout",)),
            applies=_ENCODER,
        ),
        Setting("prefix_projection", Same("method.projection"), False, "PrefixTuningConfig", _PREFIX),
        *only_off("another start of a prefix", "init_weights"),
        *idle(_OF_MODEL, "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
        *idle("data.tokenizer says it", "tokenizer_name_or_path", "tokenizer_kwargs.*", "tokenizer_kwargs"),
    ),
)
