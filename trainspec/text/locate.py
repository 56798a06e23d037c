"""Where in a rendered conversation the assistant's turns stand, for templates without `{% generation %}`.

A turn of the assistant is what the model has to write by itself: from behind what the template writes when it is asked
for a generation prompt, up to and with the token that ends the turn. It is found by rendering the conversation up to
the turn, and up to and with it: where the whole text begins with both, the difference is the turn. Templates that
write earlier turns anew (Qwen3 and R1 drop what was thought, Mistral moves the system text) do not begin so; there
the turn's content is replaced by a mark, and what stands around the mark is looked up in the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]
# Messages and whether a generation prompt is asked for -> text; None where the template refuses them.
Render = Callable[[Sequence[Message], bool], str | None]

_MARK = "Zq7wMARKv1Xk"
# How much of a text's end tells a place from others.
_TAIL = 8
_CLOSING = re.compile(r"\s*\S+")


class Unlocated(Exception):
    """What counts cannot be told from what does not; the text says why."""


class Span(NamedTuple):
    """Characters `start` to `end` are what a turn has to be learnt; the next turn begins at `next_turn`."""

    start: int
    end: int
    next_turn: int


def assistant_spans(
    text: str, messages: Sequence[Message], render: Render, special: re.Pattern[str] | None = None
) -> list[Span]:
    """One span for each assistant message, in order; `special` matches a special token. Raises Unlocated."""
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            done = spans[-1].next_turn if spans else 0
            span = _Turn(text, messages, i, done, render, special).span()
            if not (done <= span.start <= span.end <= span.next_turn <= len(text)):
                raise Unlocated("the template writes the turns in another order")
            spans.append(span)
    return spans


@dataclass(frozen=True)
class _Around:
    """What stands around the mark: in the whole conversation, and behind it where the conversation ends with the turn.

    `in_call`: the mark stands in a tool call, as the template writes no content there.
    """

    before: str
    behind: str
    behind_alone: str
    in_call: bool = False


class _Turn:
    """One assistant message of a conversation that was rendered as `text`; turns before it end at `done`."""

    def __init__(
        self,
        text: str,
        messages: Sequence[Message],
        i: int,
        done: int,
        render: Render,
        special: re.Pattern[str] | None,
    ) -> None:
        self._text, self._messages, self._i, self._done = text, messages, i, done
        self._render, self._special = render, special
        self._message = messages[i]

    def span(self) -> Span:
        """Where it stands. Raises Unlocated."""
        before = self._render(self._messages[: self._i], True) if self._i else None
        after = self._render(self._messages[: self._i + 1], False)
        begins = before is not None and self._text.startswith(before)
        ends = after is not None and self._text.startswith(after)
        if before is not None and after is not None and begins and ends and len(before) <= len(after):
            turn = self._text[len(before) : len(after)]
            return Span(len(before), len(before) + self._learnt_length(turn), len(after))
        around = self._around()
        start = len(before) if before is not None and begins else self._start(before, around)
        end, next_turn = self._end(around)
        return Span(start, end, next_turn)

    def _learnt_length(self, turn: str) -> int:
        """How much of a turn is the model's to write: not what the template writes behind the turn's end."""
        closed = len(turn.rstrip())
        content = self._message.get("content", "").rstrip()
        at = turn.find(content) + len(content) if content else -1
        closing = turn[at:].strip() if at >= len(content) > 0 else ""
        if self._message.get("tool_calls"):
            is_plain = not turn[:closed].endswith(content) if content else True
        else:
            is_plain = len(closing.split()) == 1
        if is_plain or not turn.strip():
            return closed if turn.strip() else len(turn)
        behind = self._around().behind_alone
        if not turn.endswith(behind):
            return closed
        return len(turn) - len(behind) + len(self._closing(behind))

    def _closing(self, behind: str) -> str:
        """What ends the turn, of what the template writes behind its content: a token, and no blanks behind it."""
        if self._message.get("tool_calls"):
            return behind.rstrip()
        found = _CLOSING.match(behind)
        return found[0] if found else ""

    def _around(self) -> _Around:
        """What stands around this turn's content, or where a template drops it, around the first call's name."""
        found = self._around_mark(self._message | {"content": _MARK})
        if found is None and self._message.get("tool_calls"):
            calls = _mark_call(self._message["tool_calls"])
            found = self._around_mark(self._message | {"tool_calls": calls}, in_call=True)
        if found is None:
            raise Unlocated("the template does not write an assistant's content once")
        return found

    def _around_mark(self, marked: Message, *, in_call: bool = False) -> _Around | None:
        before, behind = self._messages[: self._i], self._messages[self._i + 1 :]
        whole, alone = self._render([*before, marked, *behind], False), self._render([*before, marked], False)
        if whole is None or alone is None or whole.count(_MARK) != 1 or alone.count(_MARK) != 1:
            return None
        first, _, rest = whole.partition(_MARK)
        return _Around(first, rest, alone.partition(_MARK)[2], in_call)

    def _start(self, before: str | None, around: _Around) -> int:
        """Behind the generation prompt, where the conversation up to it is written in another way."""
        content = _common_prefix(self._text, around.before)
        if content < len(around.before) and content <= self._done:
            raise Unlocated("the template writes the turns before this one in another way")
        prompt = self._prompt(before)
        at = self._text.rfind(prompt, self._done, content) if prompt else -1
        if at >= 0:
            return at + len(prompt)
        # No prompt of its own: the turn starts where the text before it ends.
        for size in range(min(_TAIL, len(before or "")), 0, -1):
            tail = (before or "")[-size:]
            at = self._text.rfind(tail, self._done, content)
            gap = self._text[at + size : content]
            if at >= 0 and (size == _TAIL if around.in_call else gap.isspace()):
                return at + size
        if around.in_call:
            raise Unlocated("the template does not tell where a turn of calls begins")
        return content

    def _prompt(self, before: str | None) -> str:
        """What the template writes when it is asked for a generation prompt."""
        earlier = self._messages[: self._i] or [{"role": "user", "content": _MARK}]
        plain = self._render(earlier, False)
        asked = before if before is not None else self._render(earlier, True)
        if asked is None or plain is None or not asked.startswith(plain):
            return ""
        return asked[len(plain) :]

    def _end(self, around: _Around) -> tuple[int, int]:
        """Where the turn's closing ends, and where the rest of the conversation begins."""
        length = self._closing_length(around)
        rest = around.behind[length:]
        if not self._text.endswith(rest):
            raise Unlocated("the template writes the turns behind this one in another way")
        next_turn = len(self._text) - len(rest)
        return next_turn - length + len(self._closing(around.behind[:length])), next_turn

    def _closing_length(self, around: _Around) -> int:
        """How much of what stands behind the content belongs to the turn: what is there without a next turn, too."""
        behind, alone = around.behind, around.behind_alone
        common = _common_prefix(behind, alone)
        if common == len(alone):
            return common
        # A conversation's last turn is closed in another way than those before it.
        if not self._message.get("tool_calls"):
            first, last = (self._leading_special(part) for part in (behind, alone))
            if first and last:
                return first
            blank = max((m.end() for m in re.finditer(r"\s+", behind[:common])), default=0)
            if behind[:blank].strip():
                return blank
        raise Unlocated("the template closes a turn in another way where another turn follows")

    def _leading_special(self, text: str) -> int:
        """Where a special token ends that a text begins with, blanks before it aside; 0 where it begins with none."""
        blank = len(text) - len(text.lstrip())
        found = self._special.match(text, blank) if self._special else None
        return found.end() if found else 0


def _mark_call(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls, the first under a name that is the mark."""
    first, *others = calls
    function = first.get("function")
    name = {"name": _MARK}
    return [first | {"function": function | name} if isinstance(function, dict) else first | name, *others]


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
