"""The held-out records as prompts, with what answers are compared with: read once, the same on every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainspec.errors import DataError
from trainspec.files.hf import end_tokens
from trainspec.generation.generation import Prompt
from trainspec.generation.rows import check_vocabulary, room
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

    `left_out` says of others, by number, why they are no prompts; training leaves them out as well. `records` is how many there
    are in the file, `stops` the ids that end a response.
    """

    asked: tuple[Question, ...]
    too_long: tuple[int, ...]
    left_out: Mapping[int, str]
    records: int
    stops: frozenset[int]

    @property
    def first(self) -> int:
        """How many records these are, answered or not: the first ones."""
        return len(self.asked) + len(self.too_long) + len(self.left_out)

    def note(self) -> str | None:
        """What the user is told of the records that are not answered."""
        notes = []
        if count := len(self.too_long):
            notes.append(
                f"{count} held-out prompt{'s' * (count > 1)} too long for the model, not answered: record"
                f"{'s' * (count > 1)} {listed(self.too_long)}"
            )
        if count := len(self.left_out):
            notes.append(
                f"{count} held-out record{'s' * (count > 1)} left out, not answered: record{'s' * (count > 1)} "
                f"{listed(list(self.left_out))} ({next(iter(self.left_out.values()))})"
            )
        return "; ".join(notes) or None


def questions_of(
    run: Run,
    tokenizer: Tokenizer,
    *,
    way_out: str,
    examples: int | None = None,
    needs_references: bool = True,
    stop: Sequence[str] = (),
) -> Questions:
    """The first `examples` records of `data.heldout`, or all; training's own are left out alike.

    Raises DataError where one is malformed, has no response to compare with where that is needed, or has a token that the model has
    not, and where no prompt fits. `way_out` is what the user can do instead of changing records. A text of `stop` ends a response
    where it is a special token.
    """
    data, source = run.recipe.data, run.recipe.data.heldout
    if source is None:
        raise DataError("data.heldout: not given; it names the records to measure on")
    answer = tokenizer.prompts((), source, data, as_trained=True, first=examples, stop=stop)
    stops = frozenset(answer["stops"]) | end_tokens(run.directory)
    found = {record["number"]: record for record in answer["prompts"]}
    left_out = {record["number"]: record["why"] for record in answer["left_out"]}
    without = [number for number, record in found.items() if not record["references"]]
    if without and needs_references:
        raise DataError(
            f"{source}: {len(without)} of {len(found)} records have no response to compare with (record{'s' * (len(without) > 1)} "
            f"{listed(without)}); give them one, or {way_out}"
        )
    limit = room(run)
    fits = {number: _longest(record) <= limit for number, record in found.items()}
    asked = tuple(_question(number, record, run, stops) for number, record in found.items() if fits[number])
    if not asked and not found:
        raise DataError(
            f"{source}: of its first {examples} records none is a prompt; give more, or {way_out}"
        )
    if not asked:
        raise DataError(
            f"{source}: every held-out prompt is too long: {run.spec.name} has positions for {limit} tokens, and the response needs "
            f"at least one; give shorter ones, or {way_out}"
        )
    too_long = tuple(number for number, is_fitting in fits.items() if not is_fitting)
    return Questions(asked, too_long, left_out, answer["records"], stops)


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words, the first ones where there are many."""
    more = len(numbers) - _SHOWN
    return ", ".join(map(str, numbers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _longest(record: dict[str, Any]) -> int:
    """How many tokens a row needs at least: a prompt and one more, or the longest choice."""
    return max(len(record["ids"]) + 1, *(len(choice["ids"]) for choice in record["choices"]), 0)


def _question(number: int, record: dict[str, Any], run: Run, stops: frozenset[int]) -> Question:
    choices = tuple(_choice(choice, stops) for choice in record["choices"])
    ids = (i for row in (record["ids"], *(choice.ids for choice in choices)) for i in row)
    check_vocabulary(ids, run, f"{run.recipe.data.heldout}: record {number}")
    references = tuple(record["references"])
    prompt = Prompt(record["prompt"], tuple(record["ids"]), references[0] if references else None)
    return Question(number, prompt, references, choices)


def _choice(choice: dict[str, Any], stops: frozenset[int]) -> Choice:
    ids, first = tuple(choice["ids"]), choice["first"]
    while len(ids) > first + 1 and ids[-1] in stops:
        ids = ids[:-1]
    return Choice(choice["text"], ids, first)
