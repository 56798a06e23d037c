"""Responses to prompts with a backend, a batch at a time: the loop that both backends share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from trainspec.generation.choice import TokenScore, choose, score
from trainspec.generation.decoding import WholeRows
from trainspec.generation.generation import Finish, Generation, Prompt
from trainspec.generation.request import Settings
from trainspec.generation.rows import STRETCH, batch_of, room
from trainspec.runs.run import Run
from trainspec.step import Backend, Decoding, S
from trainspec.text.store import Tokenizer

Say = Callable[[str], None]


@dataclass
class Response:
    """What was generated so far; no more than `longest` ids fit."""

    longest: int
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: Finish = "length"
    is_done: bool = False


@dataclass(frozen=True)
class Responder(Generic[S]):
    """Responds to prompts with any state of a run. `stops` are the ids that end a response."""

    backend: Backend[S]
    run: Run
    tokenizer: Tokenizer
    settings: Settings
    stops: frozenset[int]

    def respond(
        self,
        state: S,
        prompts: Sequence[Prompt],
        *,
        say: Say | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Generation]]:
        """The generations of all prompts in their order, a batch of them at a time.

        `say` is called with the text of the first one of each batch, as soon as no later token changes it. Where `is_stopping`,
        which is asked before every token but a batch's first, the batch is left and no other begun.
        """
        size = min(self.settings.batch, len(prompts))
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            responses = self._batch(state, some, first, size, say, is_stopping)
            if responses is None:
                return
            texts = self._texts(responses)
            yield [
                Generation(
                    prompt.prompt,
                    prompt.ids,
                    tuple(response.ids),
                    text,
                    response.finish,
                    prompt.reference,
                    tuple(response.scores) if self.settings.scores else None,
                )
                for prompt, response, text in zip(some, responses, texts, strict=True)
            ]

    def _batch(
        self,
        state: S,
        prompts: Sequence[Prompt],
        first: int,
        size: int,
        say: Say | None,
        is_stopping: Callable[[], bool],
    ) -> list[Response] | None:
        """The responses to some prompts, the first of which has the number `first`; the batch has room for `size`.

        None where the run stops first.
        """
        limit, plan = room(self.run), self.run.recipe.plan
        responses = [Response(min(self.settings.max_tokens, limit - len(prompt.ids))) for prompt in prompts]
        longest = max(len(p.ids) + r.longest for p, r in zip(prompts, responses, strict=True))
        decoding = self._decoding(state, length=min(-(-longest // STRETCH) * STRETCH, limit))
        multiple, shown = plan.replicas * plan.microbatches, 0
        batch, last = batch_of(
            [prompt.ids for prompt in prompts], limit=limit, count=-(-size // multiple) * multiple
        )
        logits_BV = decoding.begin(batch, last)
        while True:
            added = np.full(len(last), -1, np.int32)
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                if not response.is_done:
                    seen = [*prompt.ids, *response.ids]
                    added[row] = choose(
                        logits_BV[row],
                        self.settings.sampling,
                        seen=seen,
                        prompt=first + row,
                        position=len(seen),
                    )
                    response.ids.append(int(added[row]))
                    if self.settings.scores:
                        response.scores.append(score(logits_BV[row], response.ids[-1]))
            self._end(responses)
            if say is not None:
                text = self._sure(responses[0])
                say(text[shown:])
                shown = max(shown, len(text))
            if all(response.is_done for response in responses):
                return responses
            if is_stopping():
                return None
            for row, response in enumerate(responses):
                if response.is_done:
                    added[row] = -1
            logits_BV = decoding.extend(added)

    def _decoding(self, state: S, *, length: int) -> Decoding:
        cached = self.backend.decoding(state, length=length) if self.settings.caches else None
        return cached or WholeRows(self.backend, state, limit=room(self.run))

    def _texts(self, responses: Sequence[Response]) -> list[str]:
        """Each response's text, up to a stop text."""
        kept = [r.ids[:-1] if r.ids and r.ids[-1] in self.stops else r.ids for r in responses]
        stop_texts = self.settings.stop
        return [
            text[: min((text.find(stop) for stop in stop_texts if stop in text), default=len(text))]
            for text in self.tokenizer.said(kept)
        ]

    def _end(self, responses: Sequence[Response]) -> None:
        """Mark the responses that their last token has ended: first those that it stops."""
        stop_texts = self.settings.stop
        going = [r for r in responses if not r.is_done]
        texts = self.tokenizer.said([r.ids for r in going]) if stop_texts else [""] * len(going)
        for response, text in zip(going, texts, strict=True):
            if response.ids[-1] in self.stops or any(stop in text for stop in stop_texts):
                response.finish, response.is_done = "stop", True
            elif len(response.ids) >= response.longest:
                response.is_done = True

    def _sure(self, response: Response) -> str:
        """The text of a response that no later token changes: no half of a character, and no beginning of a stop text."""
        [text] = self._texts([response])
        if response.is_done:
            return text
        text = text.rstrip("\ufffd")
        begun = (n for stop in self.settings.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]
