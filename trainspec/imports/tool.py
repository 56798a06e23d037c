"""A tool whose configurations are imported: its settings as a table, by which it is recognised and translated."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainspec.imports.settings import (
    UNSET,
    Answers,
    Case,
    NoEffect,
    Outcome,
    Question,
    Refused,
    Setting,
    Translated,
    WrongValue,
)

Origin = Literal["given", "default", "replaced"]
# Settings of ours of which a recipe has one: a choice of either stands for both.
ALTERNATIVES = (("run.steps", "run.epochs"), ("schedule.warmup_steps", "schedule.warmup_ratio"))


@dataclass(frozen=True)
class Line:
    """What became of one setting: one that the files give, a default of the tool's, or one in whose place the user gave ours.

    `source` says where a default stands that is not the tool's own.
    """

    name: str
    value: Any
    outcome: Outcome
    origin: Origin
    source: str = ""


@dataclass(frozen=True)
class Tool:
    """One tool.

    - `marks`: settings that only its files have; one of them is enough.
    - `settings`: its table, in the order in which one setting needs another.
    - `source`: where its settings and defaults stand.
    - `beside`: files that may belong to its own; their settings are in the table as `NAME.SETTING`.
    """

    name: str
    marks: tuple[str, ...]
    settings: tuple[Setting, ...]
    source: str
    beside: tuple[str, ...] = ()

    def recognises(self, given: Mapping[str, Any]) -> bool:
        """Whether a file with these settings, by dotted name, is this tool's."""
        return any(name.split(".")[0] in self.marks for name in given)

    def translate(self, given: Mapping[str, Any], answers: Answers) -> tuple[list[Line], Case]:
        """What becomes of every setting that is `given`, by dotted name, and of every default that matters."""
        case = Case(given, {setting.name: setting for setting in self.settings}, answers)
        lines: list[Line] = []
        left = dict(given)
        if answers.devices is not None:
            left["(devices)"] = answers.devices
        for setting in self.settings:
            names = [name for name in left if setting.matches(name)]
            for name in names:
                lines.append(self._line(setting, name, left.pop(name), case))
            if not names and setting.default is not UNSET and _applies(setting, case):
                lines.append(self._line(setting, setting.name, None, case))
        lines.extend(Line(name, value, self._unknown(name), "given") for name, value in left.items())
        return lines, case

    def _line(self, setting: Setting, name: str, value: Any, case: Case) -> Line:
        is_given = value is not None or (setting.null_is_value and name in case.given)
        origin: Origin = "given" if is_given else "default"
        if not is_given and setting.default is UNSET:
            return Line(name, value, NoEffect("empty, as if it were not there"), "given")
        if not _applies(setting, case):
            return Line(name, value, NoEffect("belongs to a feature that is not in use"), "given")
        used = value if is_given else setting.default
        shown = None if isinstance(used, Question) else used
        keys = setting.rule.keys
        chosen = [key for key in keys if case.chose(key)]
        replaced = Line(name, shown, Translated(note=f"--set {', '.join(chosen)}"), "replaced")
        if chosen and (len(chosen) == len(keys) or keys in ALTERNATIVES):
            return replaced
        outcome = self._outcome(setting, used, case)
        if isinstance(outcome, Refused) and chosen and chosen[0] == keys[0]:
            return replaced
        if isinstance(outcome, Translated):
            ours = {key: value for key, value in outcome.ours.items() if not case.chose(key)}
            outcome = replace(outcome, ours=ours)
            case.ours.update(ours)
        return Line(name, shown, outcome, origin, "" if is_given else setting.source)

    def _outcome(self, setting: Setting, value: Any, case: Case) -> Outcome:
        if isinstance(value, Question):
            return value
        try:
            return setting.rule(value, case)
        except WrongValue as error:
            return Refused(str(error), "a value that it can have")

    def _unknown(self, name: str) -> Refused:
        known = [setting.name for setting in self.settings if not setting.name.startswith("(")]
        close = difflib.get_close_matches(name, known, n=1)
        return Refused(f"unknown{f'; did you mean {close[0]}?' if close else ''}")


def _applies(setting: Setting, case: Case) -> bool:
    return setting.applies is None or setting.applies(case)
