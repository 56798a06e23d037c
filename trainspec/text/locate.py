"""Where in a rendered conversation the assistant's turns stand, for templates without `{% generation %}`.

A turn of the assistant is what the model has to write by itself: from behind what the template writes when it is asked
for a generation prompt, up to and with the token that ends the turn. It is found by rendering the conversation up to
the turn, and up to and with it: where the whole text begins with both, the difference is the turn. Templates that
write earlier turns anew (Qwen3 and R1 drop what was thought, Mistral moves the system text) do not begin so; there
the turn's content is replaced by a mark, and what stands around the mark is looked up in the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
# Messages and whether a generation prompt is asked for -> text; None where the template refuses them.
Render = Callable[[Sequence[Message], bool], str | None]

# What stands before and behind the mark.
Around = tuple[str, str]

_MARK = "Zq7wMARKv1Xk"
# How much of a text's end tells a place from others.
_TAIL = 8


class Unlocated(Exception):
    """What counts cannot be told from what does not; the text says why."""


class Span(NamedTuple):
    """Characters `start` to `end` are what a turn has to be learnt; the next turn begins at `next_turn`."""

    start: int
    end: int
    next_turn: int


def assistant_spans(text: str, messages: Sequence[Message], render: Render) -> list[Span]:
    """One span for each assistant message, in order. Raises Unlocated."""
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            turn = _Turn(text, messages, i, spans[-1].next_turn if spans else 0, render)
            start, end = turn.bounds()
            if not (turn.done <= start <= end <= len(text)):
                raise Unlocated("the template writes the turns in another order")
            spans.append(Span(start, start + _learnt_length(text[start:end], message), end))
    return spans


def _learnt_length(turn: str, message: Message) -> int:
    """Blank space that the template writes behind the end of a turn is not the model's to write."""
    closed = turn.rstrip()
    content = message.get("content", "").rstrip()
    ends_with_content = content and not message.get("tool_calls") and closed.endswith(content[-32:])
    return len(turn) if ends_with_content or not closed else len(closed)


class _Turn:
    """One assistant message of a conversation that was rendered as `text`; turns before it end at `done`."""

    def __init__(self, text: str, messages: Sequence[Message], i: int, done: int, render: Render) -> None:
        self.done = done
        self._text, self._messages, self._i, self._render = text, messages, i, render

    def bounds(self) -> tuple[int, int]:
        """Where it starts and ends, with what the template writes behind it before the next turn."""
        before = self._render(self._messages[: self._i], True) if self._i else None
        after = self._render(self._messages[: self._i + 1], False)
        begins = before is not None and self._text.startswith(before)
        ends = after is not None and self._text.startswith(after)
        if before is not None and after is not None and begins and ends and len(before) <= len(after):
            return len(before), len(after)
        message = self._messages[self._i]
        marked, alone = self._around(message | {"content": _MARK})
        if marked is None and message.get(
            "tool_calls"
        ):  # some templates write calls and drop the content beside them
            marked, alone = self._around(message | {"tool_calls": _mark_call(message["tool_calls"])})
        if marked is None or alone is None:
            raise Unlocated("the template does not write an assistant's content once")
        start = len(before) if before is not None and begins else self._start(before, after, marked)
        end = len(after) if after is not None and ends else self._end(marked, alone)
        return start, end

    def _around(self, marked: Message) -> tuple[Around | None, Around | None]:
        """What stands around the mark, in the whole conversation and where it ends with this turn."""
        before, behind = self._messages[: self._i], self._messages[self._i + 1 :]
        whole, alone = ([*before, marked, *behind], [*before, marked])
        return _around_mark(self._render(whole, False)), _around_mark(self._render(alone, False))

    def _start(self, before: str | None, after: str | None, marked: Around) -> int:
        """Behind the generation prompt, where the conversation up to it is written in another way."""
        content = _common_prefix(self._text, marked[0])
        if content < len(marked[0]) and content <= self.done:
            raise Unlocated("the template writes the turns before this one in another way")
        prompt = self._prompt(before, after)
        if prompt:
            at = self._text.rfind(prompt, self.done, content)
            return content if at < 0 else at + len(prompt)
        # No prompt of its own: the turn starts where the text before it ends.
        tail = (before or "")[-_TAIL:]
        at = self._text.rfind(tail, self.done, content) if tail else -1
        return content if at < 0 else at + len(tail)

    def _prompt(self, before: str | None, after: str | None) -> str | None:
        """What the template writes when it is asked for a generation prompt."""
        if self._i == 0:
            before, plain = self._render(self._messages[:1], True), after
        else:
            plain = self._render(self._messages[: self._i], False)
        if before is None or plain is None or not before.startswith(plain):
            return None
        return before[len(plain) :]

    def _end(self, marked: Around, alone: Around) -> int:
        """Before the rest of the conversation, which is what stands behind the mark, less what closes the turn."""
        rest = marked[1][_common_prefix(marked[1], alone[1]) :]
        if not self._text.endswith(rest):
            raise Unlocated("the template writes the turns behind this one in another way")
        return len(self._text) - len(rest)


def _mark_call(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls, the first under a name that is the mark."""
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
    before, _, behind = text.partition(_MARK)
    return before, behind


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
