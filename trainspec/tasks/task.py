"""What every task has, and the answers that it measures."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal, Protocol, get_args

from trainspec.errors import DataError

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
# How records become prompts: lines with the placeholders {instruction} and {input}, for `write_prompt`.
PromptForm = tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a model has written, and the answers that are right."""

    prediction: str
    references: tuple[str, ...]


class Task(Protocol):
    """A task: its prompts, and its metrics."""

    name: ClassVar[str]
    """What `data.task` says."""
    prompts: ClassVar[Mapping[Language, PromptForm]]
    """How a record is asked; the response follows on a line of its own."""
    per_answer: ClassVar[tuple[str, ...]]
    """The metrics that are means over the answers, so that an answer has them by itself; not those of a whole corpus."""

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """Every metric by name, in percent. `language` is that of the answers.

        Raises DataError without an answer, for an answer without a reference, and where a library is not installed.
        """
        ...

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """For every metric how it is computed: a library with its version and settings."""
        ...


def write_prompt(form: PromptForm, *, instruction: str, text: str) -> str:
    """A prompt: its form with a record's instruction, and its input `text` in place of {input}.

    Where that is empty, lines are left out that have {input} and not {instruction}.
    """
    lines = [line for line in form if text or "{input}" not in line or "{instruction}" in line]
    return "".join(line.format(instruction=instruction, input=text) + "\n" for line in lines)


def check_answers(answers: Sequence[Answer]) -> None:
    """Raises DataError where there is nothing to measure."""
    if not answers:
        raise DataError("no answer to measure; give records that have references")
    for number, answer in enumerate(answers, 1):
        if not answer.references:
            raise DataError(f"answer {number} has no reference to measure it by; give its record an 'output'")


def mean_percent(shares: Iterable[float]) -> float:
    """The mean of shares, in percent."""
    every = list(shares)
    return 100 * sum(every) / len(every)


def library(name: str) -> Any:
    """The module `name` of a library of metrics. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise DataError(
            f"the metrics need the package {error.name}, which is not installed; pip install 'twintrain[metrics]'"
        ) from None


def installed(package: str) -> str:
    """A library and its version, for `describe`."""
    return f"{package} {version(package)}"
