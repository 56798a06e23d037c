"""Configurations of other tools as recipes: every setting is translated, without effect here, or refused by name.

One file per tool, with its table of settings; `settings.py` has the rules that the tables are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainspec.errors import RecipeError
from trainspec.imports.axolotl import AXOLOTL
from trainspec.imports.files import Configuration, open_configuration
from trainspec.imports.llamafactory import LLAMAFACTORY
from trainspec.imports.settings import Answers, Question, Refused, Translated
from trainspec.imports.tool import Line, Tool
from trainspec.imports.trainer import TRAINER
from trainspec.imports.trl import TRL
from trainspec.recipe import Recipe, recipe_from

# The registry. A file is the first one's that recognises it.
TOOLS: tuple[Tool, ...] = (AXOLOTL, LLAMAFACTORY, TRL, TRAINER)


@dataclass(frozen=True)
class Imported:
    """A configuration with what became of each of its settings, and our settings by dotted name."""

    configuration: Configuration
    lines: list[Line]
    ours: dict[str, Any]
    chosen: frozenset[str]

    def refused(self) -> list[Line]:
        """The settings that were refused."""
        return [line for line in self.lines if isinstance(line.outcome, Refused)]

    def questions(self) -> dict[str, str]:
        """The answers that are missing, each with why it is needed."""
        reasons: dict[str, str] = {}
        for line in self.lines:
            if isinstance(line.outcome, Question):
                reasons.setdefault(line.outcome.answer, line.outcome.reason)
        return reasons

    def differences(self) -> list[Line]:
        """The settings that the recipe says as well as it can, with a difference that is named."""
        return [
            line
            for line in self.lines
            if isinstance(line.outcome, Translated) and line.outcome.note.startswith("differs")
        ]

    def recipe(self) -> Recipe:
        """The recipe. Raises RecipeError, in one line, for what was refused, for missing answers, and for values that no recipe has."""
        where = self.configuration.path
        if refused := self.refused():
            each = "; ".join(f"{line.name}: {describe_refusal(line)}" for line in refused)
            raise RecipeError(f"{where}: refused: {each}")
        if questions := self.questions():
            raise RecipeError(
                f"{where}: give " + "; ".join(f"{answer} ({why})" for answer, why in questions.items())
            )
        try:
            return recipe_from(nested(self.ours))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None


def describe_refusal(line: Line) -> str:
    """Why a setting was refused, and the way out."""
    assert isinstance(line.outcome, Refused)
    return f"{line.outcome.reason}; {line.outcome.way_out or f'--drop {line.name} does without'}"


def nested(ours: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name as the sections of a recipe, in its schema's order."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in Recipe.model_fields}
    for key in sorted(ours, key=_place):
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = ours[key]
    return {name: section for name, section in sections.items() if section}


def _place(key: str) -> int:
    """Where a setting stands in its section; those of a method stay in the order in which they were given."""
    section, _, name = key.partition(".")
    annotation = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
    fields = [field.alias or name for name, field in getattr(annotation, "model_fields", {}).items()]
    return fields.index(name) if name in fields else len(fields)


def import_configuration(
    paths: Sequence[Path], answers: Answers, *, changes: Sequence[str] = (), drops: Sequence[str] = ()
) -> Imported:
    """What becomes of the configuration in `paths`. Raises RecipeError where they are not one."""
    configuration = open_configuration(paths, TOOLS, changes=changes, drops=drops)
    lines, case = configuration.tool.translate(configuration.given, answers)
    return Imported(configuration, lines, case.ours, frozenset(answers.chosen))
