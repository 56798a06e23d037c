"""What an importer knows of one setting of another tool, and what becomes of it in a recipe.

A setting is translated, has no effect here, or is refused by name; some need an answer that is in no file, such as the
number of devices. A tool's table is a tuple of `Setting`, each with a rule from this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol


@dataclass(frozen=True)
class Translated:
    """The recipe says it, in `ours`. A `note` that begins with `differs` names what the recipe cannot say."""

    ours: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class NoEffect:
    """It changes nothing here, for this `reason`."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The recipe cannot do it, for this `reason`; `way_out` is what to write instead, if not `--drop SETTING`."""

    reason: str
    way_out: str = ""


@dataclass(frozen=True)
class Question:
    """It depends on what is in no file: `answer` is the option that gives it, `reason` says why."""

    answer: str
    reason: str


Outcome = Translated | NoEffect | Refused | Question
UNSET: Any = object()


@dataclass(frozen=True)
class Answers:
    """What the user gives on the command line besides the files; `chosen` are our settings, by `--set`."""

    devices: int | None = None
    examples: int | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)


class WrongValue(Exception):
    """A setting has a value that it cannot have; the text says what it should be."""


def number(value: Any, *, least: float | None = None, most: float | None = None, whole: bool = False) -> Any:
    """The value, where it is a finite number. Raises WrongValue."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise WrongValue(f"{format_theirs(value)} is not a number")
    if least is not None and value < least:
        raise WrongValue(f"{format_theirs(value)} is below {least:g}")
    if most is not None and value > most:
        raise WrongValue(f"{format_theirs(value)} is above {most:g}")
    if whole and value != int(value):
        raise WrongValue(f"{format_theirs(value)} is not a whole number")
    return int(value) if whole else value


class Case:
    """One configuration while it is translated: what its files give, their defaults, the answers, and our settings so far."""

    def __init__(self, given: Mapping[str, Any], settings: Mapping[str, Setting], answers: Answers) -> None:
        self.given, self.answers = given, answers
        self.ours: dict[str, Any] = dict(answers.chosen)
        self._settings = settings

    def __getitem__(self, name: str) -> Any:
        """A setting's value: as given, or the tool's default, or None."""
        if self.given.get(name) is not None:
            return self.given[name]
        setting = self._settings.get(name)
        known = (
            setting is not None and not isinstance(setting.default, Question) and setting.default is not UNSET
        )
        return setting.default if setting and known else None

    def number(self, name: str, **limits: Any) -> Any:
        """A setting's value as `number` checks it. Raises WrongValue, with the name."""
        try:
            return number(self[name], **limits)
        except WrongValue as error:
            raise WrongValue(f"{name}: {error}") from None

    def has(self, name: str) -> bool:
        """Whether the files give this setting, or one inside it, a value."""
        return any(
            value is not None and (key == name or key.startswith(f"{name}."))
            for key, value in self.given.items()
        )

    def chose(self, *keys: str) -> bool:
        """Whether the user has set one of these settings of ours."""
        return any(key in self.answers.chosen for key in keys)

    def choice(self, key: str, otherwise: Any) -> Any:
        """What the user has set `key` of ours to, or what it is `otherwise`."""
        return self.answers.chosen.get(key, otherwise)


class Rule(Protocol):
    """What becomes of a setting's value."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings of ours that it decides; the first is what theirs is about.

        Those that the user has chosen are his. The rule decides the others, and is not asked where there are none, or
        where one that is chosen stands for all (`tool.ALTERNATIVES`). What it refuses is replaced by a choice of the first.
        """
        ...

    @property
    def page(self) -> str:
        """What docs/migrate.md says of it."""
        ...

    def __call__(self, value: Any, case: Case) -> Outcome:
        """What becomes of this value."""
        ...


@dataclass(frozen=True)
class Same:
    """Our setting of another name, with the same values."""

    key: str
    note: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """See `Rule`."""
        return (self.key,)

    @property
    def page(self) -> str:
        """See `Rule`."""
        return f"`{self.key}`{f'; {self.note}' if self.note else ''}"

    def __call__(self, value: Any, case: Case) -> Outcome:
        """The value, unchanged."""
        return Translated({self.key: value}, self.note)


@dataclass(frozen=True)
class By:
    """Decided by a function of the value and of the rest of the case; `page` says how, in words."""

    decide: Callable[[Any, Case], Outcome]
    page: str
    keys: tuple[str, ...] = ()

    def __call__(self, value: Any, case: Case) -> Outcome:
        """What the function says."""
        return self.decide(value, case)


@dataclass(frozen=True)
class Read:
    """Read together with another setting, whose rule asks for it."""

    of: str
    keys: tuple[str, ...] = field(default=(), init=False)

    @property
    def page(self) -> str:
        """See `Rule`."""
        return f"read with `{self.of}`"

    def __call__(self, value: Any, case: Case) -> Outcome:
        """Nothing of its own."""
        return Translated(note=f"read with {self.of}")


@dataclass(frozen=True)
class Idle:
    """Without effect here, whatever its value."""

    reason: str
    keys: tuple[str, ...] = field(default=(), init=False)

    @property
    def page(self) -> str:
        """See `Rule`."""
        return f"no effect: {self.reason}"

    def __call__(self, value: Any, case: Case) -> Outcome:
        """The reason."""
        return NoEffect(self.reason)


OFF: tuple[Any, ...] = (False, 0, "", [], {})


@dataclass(frozen=True)
class Only:
    """One of some `values`, by default those that switch a feature off; any other is refused as `feature`."""

    feature: str
    values: tuple[Any, ...] = OFF
    way_out: str = ""
    keys: tuple[str, ...] = field(default=(), init=False)

    @property
    def page(self) -> str:
        """See `Rule`."""
        if self.values == OFF or not self.values:
            return self.feature
        return f"{self.feature} ({' or '.join(f'`{format_theirs(value)}`' for value in self.values)} is accepted)"

    def __call__(self, value: Any, case: Case) -> Outcome:
        """Without effect where it is one of the values."""
        if value not in self.values:
            return Refused(self.feature, self.way_out)
        return NoEffect("as it is here" if value else f"{self.feature}: off")


@dataclass(frozen=True)
class Setting:
    """A setting of a tool. With a `default`, which is theirs, it is in the recipe even where the file does not say it.

    `source` names where the default stands, if not where the tool's do. A `name` may have `*` for any part, and at its end
    for everything inside.
    `applies` says in which cases there is such a setting; in others a given one has no effect. `null_is_value`: null is
    not the same as leaving it out.
    """

    name: str
    rule: Rule
    default: Any = UNSET
    source: str = ""
    applies: Callable[[Case], bool] | None = None
    null_is_value: bool = False

    def matches(self, name: str) -> bool:
        """Whether this is the entry of that setting: `*` is any part of a name, and at its end any number of them."""
        if "*" not in self.name:
            return name == self.name
        pattern, parts = self.name.split("."), name.split(".")
        if pattern[-1] == "*":
            pattern.pop()
            parts = parts[: len(pattern)]
        return len(parts) == len(pattern) and all(
            p in ("*", part) for p, part in zip(pattern, parts, strict=True)
        )


def idle(reason: str, *names: str) -> tuple[Setting, ...]:
    """Settings that have no effect here, for one reason."""
    return tuple(Setting(name, Idle(reason)) for name in names)


def only_off(feature: str, *names: str, way_out: str = "") -> tuple[Setting, ...]:
    """Settings of a feature that is not here: each has to be off."""
    return tuple(Setting(name, Only(feature, way_out=way_out)) for name in names)


def within(prefix: str, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """The settings of a file that another one names `prefix`."""
    return tuple(replace(setting, name=f"{prefix}.{setting.name}") for setting in settings)


def replaced(settings: tuple[Setting, ...], *by: Setting) -> tuple[Setting, ...]:
    """A table in which `by` take the place of the settings of the same names; new ones come last."""
    new = {setting.name: setting for setting in by}
    return (*(new.pop(s.name, s) for s in settings), *new.values())


def format_theirs(value: Any) -> str:
    """A value of their file, shortened to fit a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = " ".join(text.split()) or "''"
    return text if len(text) <= 40 else f"{text[:37]}..."
