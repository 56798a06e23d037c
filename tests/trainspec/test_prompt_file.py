"""A user's prompts: read, or refused in one line that says where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from small import ROOT

from trainspec.errors import UserError
from trainspec.recipe import Data, idle_settings
from trainspec.tasks import LANGUAGES, TASKS
from trainspec.text.prompt_file import read_prompt

GOOD = "{instruction}\n{input}\nGo:\n"


def data(file: Path, **fields: object) -> Data:
    return Data(**{"train": "t.jsonl", "task": "translation", "prompts": str(file)} | fields)  # type: ignore[arg-type]


def test_a_recipe_without_a_file_has_the_tasks_own():
    for name, task in TASKS.items():
        for language in LANGUAGES:
            assert read_prompt(Data(train="t", task=name, language=language)) == task.prompts[language]
    for name in ("conversation", "text"):
        assert read_prompt(Data(train="t", task=name)) is None


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
def test_yaml_and_json_by_language_or_for_all(tmp_path: Path, write):
    file = tmp_path / "p.yaml"
    file.write_text(
        write({"translation": {"en": GOOD, "zh": "{input}{{}}{instruction}"}, "summarisation": GOOD})
    )
    assert read_prompt(data(file)) == ("{instruction}", "{input}", "Go:")
    assert read_prompt(data(file, language="zh")) == ("{input}{{}}{instruction}",)
    for language in LANGUAGES:
        assert read_prompt(data(file, task="summarisation", language=language)) == read_prompt(data(file))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("translation: {en: '{instruction} {inptu}'}", "translation.en: unknown placeholder {inptu}; did you mean 'input'?"),
        ("translation: '{instruction} {input} {}'", "translation: unknown placeholder {}; known here: input, instruction"),
        ("translation: '{instruction} {input.x}'", "unknown placeholder {input.x}"),
        ("translation: '{instruction} {input} {0}'", "unknown placeholder {0}"),
        ("translation: '{instruction!r} {input}'", "{instruction} takes no !"),
        ("translation: '{instruction} {input:9}'", "{input} takes no :"),
        ("translation: '{instruction} {input} {'", "write {{ and }} for braces"),
        ("translation: '{instruction} {input} }'", "write {{ and }} for braces"),
        ("translation: '{instruction}'", "translation: has {input} 0 times"),
        ("translation: '{input}'", "translation: has {instruction} 0 times"),
        ("translation: '{input} {input} {instruction}'", "translation: has {input} 2 times"),
        ("translation: ''", "has {instruction} 0 times"),
        ("translation: {en: 3}", "translation.en: must be a text, not 3"),
        ("translation: {}", "translation: must be a text, or {en: TEXT, zh: TEXT}"),
        ("translation: [a]", "translation: must be a text, or {en: TEXT, zh: TEXT}"),
        ("translation: {de: '{instruction} {input}'}", "translation: unknown language 'de'; known here: en, zh"),
        ("translation: {zh: '{instruction} {input}'}", "translation has no prompt for data.language=en, only for zh"),
        ("summarisation: '{instruction} {input}'", "has no prompt for data.task=translation, only for summarisation"),
        ("translator: '{instruction} {input}'", "no task is called 'translator'; did you mean 'translation'?"),
        # Malformed, though another task's.
        ("{translation: '{instruction} {input}', summarisation: x}", "summarisation: has {instruction} 0 times"),
        ("{}", "has no prompt for data.task=translation, only for nothing"),
        ("- a", "data.prompts is a mapping of tasks to prompts"),
        ("", "data.prompts is a mapping of tasks to prompts"),
        ("translation: {en", "not YAML"),
        ("translation: a\ntranslation: b", "given twice"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, content: str, said: str):
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as found:
        read_prompt(data(file))
    assert str(found.value).startswith(f"{file}: ")
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"No such file or directory; data\.prompts names a YAML or JSON file"
    ):
        read_prompt(data(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"Is a directory; data\.prompts names"):
        read_prompt(data(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not YAML"):
        read_prompt(data(tmp_path / "b.yaml"))


def test_a_file_without_use_is_said(make_recipe):
    recipe = make_recipe(data={"prompts": "p.yaml", "task": "conversation"})
    span = recipe.span(lambda: 1)
    assert "no effect: data.prompts=p.yaml: data.task=conversation has no prompt" in idle_settings(
        recipe, span
    )
    assert not [
        line for line in idle_settings(make_recipe(data={"prompts": "p.yaml"}), span) if "prompts" in line
    ]


def test_the_page_has_the_prompts_as_a_file(tmp_path: Path):
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    [block] = [
        b for b in re.findall(r"```yaml\n(.*?)```", page, flags=re.S) if b.startswith("question_answering")
    ]
    (tmp_path / "p.yaml").write_text(block, encoding="utf-8")
    for name, task in TASKS.items():
        for language in LANGUAGES:
            assert (
                read_prompt(data(tmp_path / "p.yaml", task=name, language=language)) == task.prompts[language]
            )
