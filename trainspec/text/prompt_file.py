"""The prompt that a recipe asks for: the task's own, or that of the file `data.prompts`.

translation:
  en: |
    {instruction}
    {input}
    Translation:
  zh: ...
summarisation: |          # one text is the prompt in every language
  ...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from trainspec.complaint import format_value
from trainspec.errors import DataError, nearest
from trainspec.recipe import Data
from trainspec.recipe_file import read_mapping
from trainspec.tasks import LANGUAGES, TASKS, PromptForm

PLACEHOLDERS = ("instruction", "input")


def read_prompt(data: Data) -> PromptForm | None:
    """How an instruction record of `data` is asked; None for a task without a prompt.

    Raises DataError, or RecipeError for what is not YAML, where `data.prompts` cannot be read, is malformed in any of its
    prompts, or lacks the one that is needed.
    """
    if data.task not in TASKS:
        return None
    if data.prompts is None:
        return TASKS[data.task].prompts[data.language]
    found = _read(Path(data.prompts))
    if data.task not in found:
        there = ", ".join(sorted(found)) or "nothing"
        raise DataError(f"{data.prompts}: has no prompt for data.task={data.task}, only for {there}; add one")
    if data.language not in found[data.task]:
        there = ", ".join(sorted(found[data.task]))
        raise DataError(
            f"{data.prompts}: {data.task} has no prompt for data.language={data.language}, only for {there}; add one"
        )
    return found[data.task][data.language]


def _read(file: Path) -> dict[str, dict[str, PromptForm]]:
    """The prompts of a file by task and language."""
    tree = read_mapping(
        file,
        advice="data.prompts names a YAML or JSON file",
        wanted="data.prompts is a mapping of tasks to prompts, such as {translation: {en: TEXT, zh: TEXT}}",
    )
    for task in tree:
        if task not in TASKS:
            raise DataError(f"{file}: no task is called {format_value(task)}{nearest(str(task), TASKS)}")
    return {task: _languages(value, f"{file}: {task}") for task, value in tree.items()}


def _languages(value: Any, where: str) -> dict[str, PromptForm]:
    if isinstance(value, str):
        return dict.fromkeys(LANGUAGES, _prompt(value, where))
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{where}: must be a text, or {{en: TEXT, zh: TEXT}}, not {format_value(value)}")
    for language in value:
        if language not in LANGUAGES:
            raise DataError(
                f"{where}: unknown language {format_value(language)}{nearest(str(language), LANGUAGES)}"
            )
    return {language: _prompt(text, f"{where}.{language}") for language, text in value.items()}


def _prompt(value: Any, where: str) -> PromptForm:
    """The lines of a prompt. A record's text must have its location in it, or it would be dropped without a word."""
    if not isinstance(value, str):
        raise DataError(f"{where}: must be a text, not {format_value(value)}")
    try:
        parts = list(Formatter().parse(value))
    except ValueError as error:
        raise DataError(f"{where}: {error}; write {{{{ and }}}} for braces") from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, style, conversion in parts:
        if name is not None and name not in PLACEHOLDERS:
            raise DataError(
                f"{where}: unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}; write {{{{ and }}}} for braces"
            )
        if style or conversion:
            raise DataError(f"{where}: {{{name}}} takes no {'!' if conversion else ':'}; leave it out")
    for name in PLACEHOLDERS:
        if names.count(name) != 1:
            raise DataError(
                f"{where}: has {{{name}}} {names.count(name)} times; the {name} of a record needs one location"
            )
    return tuple(value.rstrip("\n").split("\n"))
