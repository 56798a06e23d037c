"""Generation with a backend: every step makes the logits after the last token of each row, and chooses its next one.

The simplest right way, and the definition of what a cache of keys and values has to give: each step computes the whole row
anew, whatever the method, family and plan. Its cost grows with the square of a row's length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from trainspec.errors import DataError
from trainspec.files.hf import end_tokens
from trainspec.generation.choice import choose
from trainspec.generation.request import GenerationRequest
from trainspec.generation.rows import batch_of, room
from trainspec.runs.contract import Backend, S
from trainspec.runs.newest import newest_state
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.text.store import Tokenizer, find_tokenizer

FILE = "generations.jsonl"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prompt:
    """A prompt's text and ids, and the response that its record has, if any."""

    prompt: str
    ids: tuple[int, ...]
    reference: str | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated after a prompt: `ids` with the token that ends it, `text` without.

    `finish` is `stop` where an end token or a stop text came, `length` where the limit was reached.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish: Literal["stop", "length"]
    reference: str | None = None

    def line(self) -> str:
        """A line of generations.jsonl."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False)


def generate(
    backend: Backend[S], run: Run, request: GenerationRequest, processes: Processes
) -> list[Generation]:
    """Generate for every prompt, in their order; the leader writes `generations.jsonl` and says what was generated.

    Raises UserError for a prompt that cannot be read, is empty, or leaves no room in the model.
    """
    data = run.recipe.data
    tokenizer = find_tokenizer(data, run.directory, run.recipe.model.from_)
    asked = tokenizer.prompts(request.texts, str(request.file) if request.file else None, data)
    prompts = [Prompt(p["prompt"], tuple(p["ids"]), p["reference"]) for p in asked["prompts"]]
    _check(prompts, run)
    stops = frozenset(asked["stops"]) | end_tokens(run.directory)
    state, whose = newest_state(
        backend, run, out=request.out, processes=processes, tokenizer_digest=tokenizer.digest
    )
    say = _print if processes.is_leader else _ignore
    say(f"generating with {whose}\n")
    writer = _Writer(tokenizer, request, stops)
    made: list[Generation] = []
    size = min(request.batch, len(prompts))
    with _file(request.out / FILE) if processes.is_leader else nullcontext() as file:
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            streamed = say if request.streams else None
            responses = _respond(backend, run, state, some, first, size, request, writer, streamed)
            texts = writer.texts(responses)
            done = [
                Generation(p.prompt, p.ids, tuple(r.ids), text, r.finish, p.reference)
                for p, r, text in zip(some, responses, texts, strict=True)
            ]
            made += done
            if file is not None:  # what is done stays, whatever ends the rest
                file.write("".join(generation.line() + "\n" for generation in done))
                file.flush()
    stopped = sum(g.finish == "stop" for g in made)
    end = "\n" if request.streams else ""
    say(f"{end}wrote {request.out / FILE}: {len(made)} responses, {stopped} ended by themselves\n")
    return made


def _file(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


@dataclass
class _Response:
    """What was generated so far; no more than `longest` ids fit."""

    longest: int
    ids: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"
    is_done: bool = False


class _Writer:
    """Texts of responses, and where they end."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, stops: frozenset[int]) -> None:
        self._tokenizer, self._texts, self._stops = tokenizer, request.stop, stops

    def texts(self, responses: Sequence[_Response]) -> list[str]:
        """Each response's text, up to a stop text."""
        kept = [r.ids[:-1] if r.ids and r.ids[-1] in self._stops else r.ids for r in responses]
        return [
            text[: min((text.find(stop) for stop in self._texts if stop in text), default=len(text))]
            for text in self._tokenizer.said(kept)
        ]

    def end(self, responses: Sequence[_Response]) -> None:
        """Mark the responses that their last token has ended: first those that it stops."""
        going = [r for r in responses if not r.is_done]
        texts = self._tokenizer.said([r.ids for r in going]) if self._texts else [""] * len(going)
        for response, text in zip(going, texts, strict=True):
            if response.ids[-1] in self._stops or any(stop in text for stop in self._texts):
                response.finish, response.is_done = "stop", True
            elif len(response.ids) >= response.longest:
                response.is_done = True

    def sure(self, response: _Response) -> str:
        """The text of a response that no later token changes: no half of a character, and no beginning of a stop text."""
        [text] = self.texts([response])
        if response.is_done:
            return text
        text = text.rstrip("\ufffd")
        begun = (n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]


def _respond(
    backend: Backend[S],
    run: Run,
    state: S,
    prompts: Sequence[Prompt],
    first: int,
    size: int,
    request: GenerationRequest,
    writer: _Writer,
    say: Say | None,
) -> list[_Response]:
    """The responses to some prompts, the first of which has the number `first`. Batches have `size` rows to the end."""
    limit, plan = room(run), run.recipe.plan
    responses = [_Response(min(request.max_tokens, limit - len(prompt.ids))) for prompt in prompts]
    multiple, shown = plan.replicas * plan.microbatches, 0
    while not all(response.is_done for response in responses):
        rows = [
            [] if response.is_done else [*prompt.ids, *response.ids]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        batch, last = batch_of(rows, limit=limit, count=-(-size // multiple) * multiple)
        logits_BV = backend.next_logits(state, batch, last)
        for number, (response, row) in enumerate(zip(responses, rows, strict=True)):
            if row:
                chosen = choose(
                    logits_BV[number],
                    request.sampling,
                    seen=row,
                    prompt=first + number,
                    position=len(row),
                )
                response.ids.append(chosen)
        writer.end(responses)
        if say is not None:
            text = writer.sure(responses[0])
            say(text[shown:])
            shown = max(shown, len(text))
    return responses


def _check(prompts: Sequence[Prompt], run: Run) -> None:
    limit = room(run)
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.ids) >= limit:
            raise DataError(
                f"prompt {number} has {len(prompt.ids)} tokens: {run.spec.name} has positions for {limit}, and the response "
                "needs at least one; shorten it"
            )
        if max(prompt.ids) >= run.spec.vocab:
            raise DataError(
                f"prompt {number} has token {max(prompt.ids)}: {run.spec.name} has {run.spec.vocab}; set data.tokenizer to "
                "the model's own"
            )
