"""What transformers says of a conversation: ids from the template, what counts from its tagged twin.

The ids are `apply_chat_template`'s. What counts are the characters that the twin marks; a token counts where it holds
one of them. `return_assistant_tokens_mask` is the same but for gaps of transformers 5.23, which looks up the first and
the last of the characters only, and of each the first token. `Verdict.gap` names which of them it is where the two
differ; a difference that is none of them is a mistake of this judge, and the test says so.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from oracle.templates import without_tags

Messages = list[dict[str, Any]]

NO_TOKEN_AT_START = "nothing is marked from a span on whose first character is in no token"
NO_TOKEN_AT_END = "all is marked from a span on whose last character is in no token"
FIRST_OF_SEVERAL = "of the tokens of a span's last character only the first is marked"
EMPTY = "an empty span marks the token around it"

REFUSES = "the template refuses (raise_exception)"
NO_CONTENT = "the template needs `content`, and beside the calls there is none"
NO_SPECIAL = "the template adds a begin or end token that the tokenizer does not name"


class Refused(Exception):
    """transformers cannot render the conversation; the text is the class of the reason."""


@dataclass(frozen=True)
class Verdict:
    """`counts` by the marked characters, `transformers` by its own mask; `gap` says why they differ where they do.

    `starts` are the characters that the tokens begin at.
    """

    text: str
    spans: list[tuple[int, int]]
    ids: list[int]
    starts: list[int]
    counts: list[bool]
    transformers: list[bool]
    gap: str | None


class Judge:
    """A tokenizer directory as a user of transformers has it."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        # Byte-level post-processors may leave blanks out of the offsets; they do nothing else to a chat, which is
        # encoded without special tokens.
        self._exact = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._exact.no_truncation()
        self._exact.no_padding()
        self._exact.post_processor = None

    def verdict(self, tagged: str, messages: Messages, tools: list[dict[str, Any]] | None) -> Verdict:
        """Of the source of a tagged twin. Raises Refused."""
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=without_tags(tagged), tokenize=True, return_dict=False
            )
        except jinja2.TemplateError as error:
            raise Refused(_reason(error)) from error
        masked = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=tagged,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert masked["input_ids"] == ids
        [text], [spans] = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tagged,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        exact = self._exact.encode(text, add_special_tokens=False)
        assert exact.ids == ids
        counts = [any(a < end and start < b for a, b in spans) for start, end in exact.offsets]
        theirs = [bool(flag) for flag in masked["assistant_masks"]]
        gap = _gap(spans, masked.encodings[0]) if counts != theirs else None
        return Verdict(text, spans, ids, [start for start, _ in exact.offsets], counts, theirs, gap)


def fix_clock(monkeypatch: Any, date: datetime.date) -> None:
    """Let transformers' `strftime_now` tell `date`."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.combine(date, datetime.time(), tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def _reason(error: jinja2.TemplateError) -> str:
    if type(error) is jinja2.TemplateError:
        return REFUSES
    message = str(error)
    if "'content'" in message:
        return NO_CONTENT
    if "'bos_token'" in message or "'eos_token'" in message:
        return NO_SPECIAL
    return f"{type(error).__name__}: {message}"


def _gap(spans: Sequence[tuple[int, int]], encoding: Any) -> str | None:
    """The first thing by which transformers' mask is not what the spans say."""
    for start, end in spans:
        first = encoding.char_to_token(start)
        if first is None:
            return NO_TOKEN_AT_START
        last = encoding.char_to_token(end - 1)
        if start == end and (last is None or last >= first):
            return EMPTY
        if last is None:
            return NO_TOKEN_AT_END
        behind = encoding.offsets[last + 1 : last + 2]
        if behind and behind[0][0] < end and behind[0][1] > start and start < end:
            return FIRST_OF_SEVERAL
    return None
