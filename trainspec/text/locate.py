"""Locates the assistant's turns in a rendered conversation, for templates without `{% generation %}`.

An assistant's turn is what the model has to write itself: everything after the generation prompt, up to and including
the token that ends the turn. Render the conversation up to the turn, and up to its end: if the whole text starts with
both, the difference is the turn. Templates that rewrite earlier turns (Qwen3 and R1 drop thoughts, Mistral moves the
system text) break this. There the turn's content is replaced by a mark, and the text around the mark is looked up in the
whole text. What a template writes around any answer is learnt once, from two short conversations (`Style`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]
# (messages, with a generation prompt) -> text; None where the template refuses them.
Render = Callable[[Sequence[Message], bool], str | None]

# The text before and after the mark.
Around = tuple[str, str]

_MARK = "Zq7wMARKv1Xk"
_QUESTION: Message = {"role": "user", "content": "Hi?"}


class Unlocated(Exception):
    """The targets cannot be located; the text says why."""


class Span(NamedTuple):
    """Characters `start` to `end` of a turn are targets; the next turn begins at `next_turn`."""

    start: int
    end: int
    next_turn: int


@dataclass(frozen=True)
class Style:
    """What a template writes around an answer; None where it does not show.

    - `prompt`: the generation prompt.
    - `lead`, `call_lead`: between it and the answer's content, or the name of its call; part of the turn.
    - `closing`: after the content, with any blank space after the end token.
    - `endings`: after the last turn, by whether that is the assistant's; part of no turn (Phi-3's end of text).
    """

    prompt: str | None
    lead: str | None
    call_lead: str | None
    closing: str | None
    endings: dict[bool, str]

    @classmethod
    def of(cls, render: Render, tokens: re.Pattern[str]) -> Style:
        """The style of a template. `render` is for conversations without tools; `tokens` matches the added tokens."""
        question: Message = {"role": "user", "content": _MARK}
        call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": _MARK, "arguments": {}}}
        answer, calling = (
            [question | {"content": "Hi?"}, {"role": "assistant", **said}]
            for said in ({"content": _MARK}, {"tool_calls": [call]})
        )
        asked, plain = (_around_mark(render([question], prompt)) for prompt in (True, False))
        shared = _shared(asked[1], plain[1], tokens) if asked and plain else 0
        prompt = asked[1][shared:] if asked else None
        start = render(answer[:1], True)
        said, last = (_around_mark(render(answer, prompt)) for prompt in (True, False))
        called = _around_mark(render(calling, False))
        closing = (
            said[1].removesuffix(prompt) if said and prompt is not None and said[1].endswith(prompt) else None
        )
        ending = ""
        if last and closing and closing.strip() and last[1].startswith(closing):
            ending = last[1].removeprefix(closing)
        endings = {False: plain[1][shared:] if plain else "", True: ending}
        return cls(prompt, _after(last, start), _after(called, start), closing, endings)

    def without_ending(self, text: str, last: Message) -> str:
        """A conversation's text without what follows its last turn."""
        return text.removesuffix(self.endings[last["role"] == "assistant"])

    def learnt_length(self, turn: str, message: Message) -> int:
        """The length of a turn without the blank space that the template writes after its end."""
        closing = self.closing
        if closing is None:
            closed, content = turn.rstrip(), message.get("content", "").rstrip()
            ends_with_content = content and not message.get("tool_calls") and closed.endswith(content[-32:])
            return len(turn) if ends_with_content or not closed else len(closed)
        return len(turn.rstrip()) if closing.strip() else len(turn.removesuffix(closing))


def _after(around: Around | None, start: str | None) -> str | None:
    if around is None or start is None or not around[0].startswith(start):
        return None
    return around[0][len(start) :]


def _shared(a: str, b: str, tokens: re.Pattern[str]) -> int:
    """The length of the common prefix of two texts, cut back to where a token may begin."""
    shared = _common_prefix(a, b)
    if shared in (len(a), len(b)):
        return shared
    inside = [t.start() for text in (a, b) for t in tokens.finditer(text) if t.start() < shared < t.end()]
    if inside:
        return min(inside)
    borders = [t.end() for t in tokens.finditer(a[:shared])]
    borders += [i + 1 for i, character in enumerate(a[:shared]) if character.isspace()]
    return max(borders, default=0)


def assistant_spans(text: str, messages: Sequence[Message], render: Render, style: Style) -> list[Span]:
    """The span of each assistant message, in order. Raises Unlocated."""
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            turn = _Turn(text, messages, i, spans[-1].next_turn if spans else 0, render, style)
            start, end = turn.bounds()
            if not (turn.done <= start <= end <= len(text)):
                raise Unlocated("the template writes the turns in another order")
            spans.append(Span(start, start + style.learnt_length(text[start:end], message), end))
    return spans


class _Turn:
    """One assistant message of a conversation rendered as `text`; earlier turns end at `done`."""

    def __init__(
        self, text: str, messages: Sequence[Message], i: int, done: int, render: Render, style: Style
    ) -> None:
        self.done = done
        self._text, self._messages, self._i, self._render, self._style = text, messages, i, render, style

    def bounds(self) -> tuple[int, int]:
        """Where the turn starts, and where the next one does."""
        before = self._render(self._messages[: self._i], True) if self._i else None
        start = len(before) if before is not None and self._text.startswith(before) else None
        end = self._end()
        if start is not None and end is not None and start <= end:
            return start, end
        message, lead = self._messages[self._i], self._style.lead
        whole, closing = self._around(message | {"content": _MARK})
        if whole is None and message.get("tool_calls"):
            # Some templates write the calls and drop the content.
            whole, closing = self._around(message | {"tool_calls": _mark_call(message["tool_calls"])})
            lead = self._style.call_lead
        if whole is None or closing is None:
            raise Unlocated("the template does not write an assistant's content once")
        return (
            self._start_before(whole[0], lead) if start is None else start,
            self._end_after(whole[1], closing) if end is None else end,
        )

    def _end(self) -> int | None:
        """Where the conversation up to and including this turn ends, if the whole text starts with it."""
        with_this = self._messages[: self._i + 1]
        plain = self._render(with_this, False)
        if plain is not None:
            plain = self._style.without_ending(plain, with_this[-1])
            if self._text.startswith(plain):
                return len(plain)
        # A last turn may end differently from others: ask for one more.
        asked, prompt = self._render(with_this, True), self._style.prompt
        if asked is not None and prompt and asked.endswith(prompt):
            asked = asked.removesuffix(prompt)
            return len(asked) if self._text.startswith(asked) else None
        return None

    def _around(self, marked: Message) -> tuple[Around | None, str | None]:
        """The text around the mark in the whole conversation, and the text that closes the turn."""
        before, after = self._messages[: self._i], self._messages[self._i + 1 :]
        whole = _around_mark(self._render([*before, marked, *after], False))
        if whole is None or not after:
            return whole, self._style.without_ending(whole[1], marked) if whole else None
        asked, prompt = _around_mark(self._render([*before, marked], True)), self._style.prompt
        if asked is not None and prompt is not None and asked[1].endswith(prompt):
            return whole, asked[1].removesuffix(prompt)
        alone = _around_mark(self._render([*before, marked], False))
        return whole, self._style.without_ending(alone[1], marked) if alone else None

    def _start_before(self, marked: str, lead: str | None) -> int:
        """The start of a turn whose preceding conversation is rewritten: after its generation prompt."""
        content = _common_prefix(self._text, marked)
        if content < len(marked) and content <= self.done:
            raise Unlocated("the template writes the turns before this one in another way")
        prompt = self._style.prompt
        if prompt:
            times = self._text.count(prompt, self.done, content)
            if times > 1:  # one may be part of the turn, as between thoughts and answer
                raise Unlocated("the template begins this turn in another way than one by itself")
            return self._text.index(prompt, self.done, content) + len(prompt) if times else content
        # Without a generation prompt the turn starts with the lead.
        if lead is None or not self._text.endswith(lead, self.done, content):
            raise Unlocated("the template begins this turn in another way than one by itself")
        return content - len(lead)

    def _end_after(self, marked: str, closing: str) -> int:
        """The end of the turn: what follows the mark and is not the closing is the rest of the conversation."""
        rest = marked[len(closing) :]
        if not marked.startswith(closing):
            raise Unlocated("the template ends this turn in another way than a last one")
        if not self._text.endswith(rest):
            raise Unlocated("the template writes the turns after this one in another way")
        return len(self._text) - len(rest)


def _mark_call(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls, the first renamed to the mark."""
    first, *others = calls
    function = first.get("function")
    marked = (
        first | {"function": function | {"name": _MARK}}
        if isinstance(function, dict)
        else first | {"name": _MARK}
    )
    return [marked, *others]


def _around_mark(text: str | None) -> Around | None:
    if text is None or text.count(_MARK) != 1:
        return None
    before, _, after = text.partition(_MARK)
    return before, after


def _common_prefix(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
