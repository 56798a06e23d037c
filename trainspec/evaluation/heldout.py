"""The held-out records as prompts, with what answers are compared with: read once, the same on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainspec.errors import DataError
from trainspec.files.hf import end_tokens
from trainspec.generation.generation import Prompt
from trainspec.generation.rows import room
from trainspec.runs.run import Run
from trainspec.text.store import Tokenizer

_SHOWN = 20


@dataclass(frozen=True)
class Choice:
    """One of the answers that a record offers: its text, and its row of ids, whose tokens from `first` on are the answer's.

    The token that ends a response is not among them: the text alone is measured, as lm-eval does.
    """

    text: str
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Question:
    """A held-out record, `number` counted from 1: its prompt, the right answers, and those that it offers, if it does."""

    number: int
    prompt: Prompt
    references: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Questions:
    """The held-out records of a run. `too_long` are the numbers of those that leave the model no room for an answer.

    `records` is how many there are in the file, `stops` the ids that end a response.
    """

    asked: tuple[Question, ...]
    too_long: tuple[int, ...]
    records: int
    stops: frozenset[int]

    def note(self) -> str | None:
        """What the user is told of the records that are too long."""
        if not self.too_long:
            return None
        count = len(self.too_long)
        return (
            f"{count} held-out prompt{'s' * (count > 1)} too long for the model, not answered: record"
            f"{'s' * (count > 1)} {listed(self.too_long)}"
        )


def questions_of(run: Run, tokenizer: Tokenizer, *, examples: int | None = None) -> Questions:
    """The first `examples` records of `data.heldout`, or all.

    Raises DataError where one is malformed, has no response, or has a token that the model has not, and where no prompt fits.
    """
    data, source = run.recipe.data, run.recipe.data.heldout
    if source is None:
        raise DataError("data.heldout: not given; it names the records to measure on")
    answer = tokenizer.prompts((), source, data)
    stops = frozenset(answer["stops"]) | end_tokens(run.directory)
    numbered = list(enumerate(answer["prompts"], 1))[:examples]
    without = [number for number, record in numbered if not record["references"]]
    if without:
        raise DataError(
            f"{source}: {len(without)} of {len(numbered)} records have no response to compare with (record{'s' * (len(without) > 1)} "
            f"{listed(without)}); give them one, or measure the loss alone"
        )
    limit = room(run)
    fits = {number: _longest(record) <= limit for number, record in numbered}
    asked = tuple(_question(number, record, run, stops) for number, record in numbered if fits[number])
    if not asked:
        raise DataError(
            f"{source}: every held-out prompt is too long: {run.spec.name} has positions for {limit} tokens, and the response needs "
            "at least one; give shorter ones"
        )
    too_long = tuple(number for number, is_fitting in fits.items() if not is_fitting)
    return Questions(asked, too_long, len(answer["prompts"]), stops)


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words, the first ones where there are many."""
    more = len(numbers) - _SHOWN
    return ", ".join(map(str, numbers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _longest(record: dict[str, Any]) -> int:
    """How many tokens a row needs at least: a prompt and one more, or the longest choice."""
    return max(len(record["ids"]) + 1, *(len(choice["ids"]) for choice in record["choices"]), 0)


def _question(number: int, record: dict[str, Any], run: Run, stops: frozenset[int]) -> Question:
    choices = tuple(_choice(choice, stops) for choice in record["choices"])
    largest = max(i for ids in (record["ids"], *(choice.ids for choice in choices)) for i in ids)
    if largest >= run.spec.vocab:
        raise DataError(
            f"{run.recipe.data.heldout}: record {number} has token {largest}: {run.spec.name} has {run.spec.vocab}; set "
            "data.tokenizer to the model's own"
        )
    references = tuple(record["references"])
    prompt = Prompt(record["prompt"], tuple(record["ids"]), references[0])
    return Question(number, prompt, references, choices)


def _choice(choice: dict[str, Any], stops: frozenset[int]) -> Choice:
    ids, first = tuple(choice["ids"]), choice["first"]
    while len(ids) > first + 1 and ids[-1] in stops:
        ids = ids[:-1]
    return Choice(choice["text"], ids, first)
