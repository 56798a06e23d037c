"""Generation with a backend: every step makes the logits after the last token of each row, and chooses its next one.

The simplest right way, and the definition of what a cache of keys and values has to give: each step computes the whole row
anew, whatever the method, family and plan. Its cost grows with the square of a row's length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainspec.checkpoints.folders import latest
from trainspec.checkpoints.formats import Formats
from trainspec.errors import DataError
from trainspec.files.hf import end_tokens
from trainspec.generation.choice import choose
from trainspec.generation.request import GenerationRequest
from trainspec.generation.rows import batch_of, room
from trainspec.runs.contract import Backend, S
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.text.store import Tokenizer, find_tokenizer

FILE = "generations.jsonl"
Say = Callable[[str], None]
_BATCH = 8


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
    state, whose = _trained(backend, run, request.out)
    say = _print if processes.is_leader else _ignore
    say(f"generating with {whose}\n")
    writer = _Writer(tokenizer, request, stops)
    made: list[Generation] = []
    size = request.batch or _BATCH
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        streamed = say if request.streams else None
        responses = _respond(backend, run, state, some, first, request, writer, streamed)
        texts = writer.texts(responses)
        made += [
            Generation(p.prompt, p.ids, tuple(r.ids), text, r.finish, p.reference)
            for p, r, text in zip(some, responses, texts, strict=True)
        ]
    if processes.is_leader:
        _write(request.out / FILE, made)
    stopped = sum(g.finish == "stop" for g in made)
    say(
        f"{chr(10) * request.streams}wrote {request.out / FILE}: {len(made)} responses, {stopped} ended by themselves\n"
    )
    return made


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


@dataclass
class _Response:
    ids: list[int]
    finish: Literal["stop", "length"] = "length"
    is_done: bool = False


class _Writer:
    """Texts of responses, and where they end."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, stops: frozenset[int]) -> None:
        self._tokenizer, self._request, self.stops = tokenizer, request, stops

    def texts(self, responses: Sequence[_Response]) -> list[str]:
        """Each response's text, up to a stop text."""
        texts = self._tokenizer.said(
            [r.ids[:-1] if r.ids[-1:] and r.ids[-1] in self.stops else r.ids for r in responses]
        )
        return [
            text[: min((text.find(s) for s in self._request.stop if s in text), default=len(text))]
            for text in texts
        ]

    def end(self, responses: Sequence[_Response]) -> None:
        """Mark the responses that their last token has ended."""
        going = [r for r in responses if not r.is_done]
        for response in going:
            if response.ids[-1] in self.stops:
                response.finish, response.is_done = "stop", True
            elif len(response.ids) >= self._request.max_tokens:
                response.is_done = True
        if self._request.stop:
            texts = self._tokenizer.said([r.ids for r in going])
            for response, text in zip(going, texts, strict=True):
                if any(stop in text for stop in self._request.stop):
                    response.finish, response.is_done = "stop", True


def _respond(
    backend: Backend[S],
    run: Run,
    state: S,
    prompts: Sequence[Prompt],
    first: int,
    request: GenerationRequest,
    writer: _Writer,
    say: Say | None,
) -> list[_Response]:
    """The responses to some prompts, the first of which has the number `first`."""
    responses, limit, plan = [_Response([]) for _ in prompts], room(run), run.recipe.plan
    shown = 0
    while going := [i for i, response in enumerate(responses) if not response.is_done]:
        rows = [[*prompts[i].ids, *responses[i].ids] for i in going]
        batch, last = batch_of(rows, limit=limit, multiple=plan.replicas * plan.microbatches)
        logits_BV = backend.next_logits(state, batch, last)
        for i, row, logits_V in zip(going, rows, logits_BV, strict=False):
            response = responses[i]
            response.ids.append(
                choose(logits_V, request.sampling, seen=row, prompt=first + i, position=len(row))
            )
            if len(row) + 1 >= limit:
                response.is_done = True
        writer.end(responses)
        if say is not None:
            [text] = writer.texts(responses)
            # Half of a character is shown as soon as it is whole.
            whole = text if responses[0].is_done else text.rstrip("\ufffd")
            if len(whole) > shown:
                say(whole[shown:])
                shown = len(whole)
    return responses


def _trained(backend: Backend[S], run: Run, out: Path) -> tuple[S, str]:
    """The state of the newest checkpoint, or of the starting weights, and its name."""
    state, saved = backend.init_state(run), latest(out)
    if saved is None:
        return state, f"the starting weights (no checkpoint under {out})"
    state = Formats(backend, run, Processes()).restore(state, saved)
    return state, f"{out} at step {state.step}"


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


def _write(path: Path, generations: Sequence[Generation]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(g.line() + "\n" for g in generations), encoding="utf-8")
    unfinished.rename(path)
