"""The importer's tables against the tools' own classes: every setting is known, every default is theirs."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainspec.imports import TOOLS
from trainspec.imports.deepspeed import SETTINGS as DEEPSPEED
from trainspec.imports.page import page
from trainspec.imports.peft import SETTINGS as PEFT
from trainspec.imports.settings import UNSET, Answers, Question, Refused, Setting, idle, only_off

ROOT = Path(__file__).parent.parent.parent
BY_NAME = {tool.name: tool for tool in TOOLS}
TRAINER, TRL = BY_NAME["Hugging Face's Trainer"], BY_NAME["TRL's SFTTrainer"]
# The classes of tools that cannot be installed here, as facts: every setting with its default.
CLASSES = yaml.safe_load((Path(__file__).parent / "configurations/defaults.yaml").read_text())
TABLES = {"trl": TRL, "llamafactory": BY_NAME["LLaMA-Factory"], "axolotl": BY_NAME["Axolotl"]}
# Defaults that a class leaves open, and what decides them there.
DECIDED_ELSEWHERE = {
    "trl": {"lora_target_modules": "PEFT, by the model's type", "bf16": "true where fp16 is not set (_BaseConfig.__post_init__)"},
    "axolotl": {
        "peft_use_rslora": "LoraConfig",
        "adam_beta1": "TrainingArguments",
        "adam_beta2": "TrainingArguments",
        "adam_epsilon": "TrainingArguments",
        "max_grad_norm": "TrainingArguments",
        "seed": "TrainingArguments",
        "save_total_limit": "_configure_save_and_eval_strategy",
        "excess_length_strategy": "utils/data/utils.py",
        "sample_packing": "null is off",
    },
}  # fmt: skip
# Decided when an object is made: AdamW, fused where torch can; no recomputation unless one of two names asks for it.
COMPUTED = {"optim", "gradient_checkpointing"}


def known(name: str, settings: tuple[Setting, ...]) -> bool:
    return any(setting.matches(name) or setting.matches(f"{name}.x") for setting in settings)


def default(name: str, settings: tuple[Setting, ...]) -> Any:
    setting = next((s for s in settings if s.name == name), None)
    return UNSET if setting is None or isinstance(setting.default, Question) else setting.default


def fields(module: str, *classes: str) -> dict[str, Any]:
    """The annotated fields of classes with their defaults; nothing is imported, as these would import torch."""
    package, _, inside = module.partition(".")
    home = find_spec(package).submodule_search_locations[0]
    found = {}
    for node in ast.walk(ast.parse(Path(home, *inside.split(".")).with_suffix(".py").read_text())):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for line in node.body:
                if isinstance(line, ast.AnnAssign):
                    found[line.target.id] = literal(line.value)
    assert found, module
    return found


def literal(value: ast.expr | None) -> Any:
    """A default as a value; UNSET where it is an expression."""
    if isinstance(value, ast.Call):
        value = next((k.value for k in value.keywords if k.arg in ("default", "default_factory")), None)
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return UNSET


@pytest.mark.parametrize("tool", CLASSES)
def test_every_setting_of_the_tool_is_known(tool: str):
    assert not [name for name in CLASSES[tool]["settings"] if not known(name, TABLES[tool].settings)]
    assert not known("invented_setting", TABLES[tool].settings)


@pytest.mark.parametrize("tool", CLASSES)
def test_every_default_is_the_tools_own(tool: str):
    theirs, settings = CLASSES[tool]["settings"], TABLES[tool].settings
    ours = {name: value for name in theirs if (value := default(name, settings)) is not UNSET}
    assert len(ours) > 5
    others = {name for name, value in ours.items() if value != theirs[name]}
    assert others == set(DECIDED_ELSEWHERE.get(tool, {}))


@pytest.mark.parametrize("tool", [TRAINER, TRL, TABLES["llamafactory"]], ids=lambda tool: tool.name)
def test_every_training_argument_is_known(tool):
    theirs = fields("transformers.training_args", "TrainingArguments")
    assert not [name for name in theirs if not known(name, tool.settings)]


def test_the_trainers_defaults_are_those_that_are_installed():
    theirs = fields("transformers.training_args", "TrainingArguments")
    ours = {name: default(name, TRAINER.settings) for name in theirs}
    decided = {name: value for name, value in ours.items() if value is not UNSET and name not in COMPUTED}
    assert {
        "learning_rate",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "num_train_epochs",
    } <= decided.keys()
    assert decided == {name: theirs[name] for name in decided}
    assert ours["optim"] in ("adamw_torch", "adamw_torch_fused")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("peft.tuners.lora.config", "LoraConfig"),
        ("peft.tuners.prompt_tuning.config", "PromptTuningConfig"),
        ("peft.tuners.p_tuning.config", "PromptEncoderConfig"),
        ("peft.tuners.prefix_tuning.config", "PrefixTuningConfig"),
        ("peft.config", "PromptLearningConfig"),
        ("peft.config", "PeftConfig"),
    ],
)
def test_every_setting_of_an_adapter_is_known_with_its_default(module: str, name: str):
    theirs = fields(module, name)
    assert not [key for key in theirs if not known(f"adapter_config.{key}", PEFT)]
    for key, value in theirs.items():
        ours = default(f"adapter_config.{key}", PEFT)
        if ours is not UNSET and value is not UNSET and key != "target_modules":
            assert ours == value, key


def test_every_setting_of_zero_is_known():
    theirs = fields("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig")
    others = {
        "zenflow",
        "leaf_module",
        "save_muon_momentum_buffer_in_memory",
    }  # engines and optimizers of its own
    assert {key for key in theirs if not known(f"deepspeed.zero_optimization.{key}", DEEPSPEED)} == others


ALL_DEFAULTS = {
    "trainer": (TRAINER, fields("transformers.training_args", "TrainingArguments")),
    **{name: (tool, CLASSES[name]["settings"]) for name, tool in TABLES.items()},
}


@pytest.mark.parametrize("name", ALL_DEFAULTS)
def test_a_file_that_says_every_default_is_the_empty_file(name: str):
    """As the Trainer writes it: nothing of it is refused, and the recipe is the same."""
    tool, theirs = ALL_DEFAULTS[name]
    given = {key: value for key, value in theirs.items() if value is not UNSET and value != "(not said here)"}
    answers = Answers(devices=1, examples=100)
    lines, whole = tool.translate(given, answers)
    assert not [line for line in lines if isinstance(line.outcome, Refused)]
    ours, empty = whole.ours, tool.translate({}, answers)[1].ours
    assert {key: value for key, value in ours.items() if key != "model.weights"} == empty
    assert ours.get("model.weights", "pretrained") == "pretrained"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_setting_has_one_entry(tool):
    names = [setting.name for setting in tool.settings]
    assert sorted(set(names)) == sorted(names)


def test_a_second_entry_and_a_wrong_default_are_seen():
    """Controls of the tests above."""
    twice = [s.name for s in (*idle("why", "a"), *only_off("what", "a"))]
    assert sorted(set(twice)) != sorted(twice)
    assert default("learning_rate", TRAINER.settings) != default("learning_rate", TRL.settings)


def test_the_page_is_current():
    written = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")
    assert written == page(), "make it again: python -m trainspec.imports.page docs/migrate.md"
