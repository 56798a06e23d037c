"""Records as token ids, by transformers' own tokenizers and chat templates. Imported by the worker process only.

A record is rendered once and encoded once. Targets are located as characters and mapped to tokens by the tokenizer's
offsets, as transformers does for its `return_assistant_tokens_mask`.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # the cores are shared by processes, each with one thread
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from trainspec.date import DATE
from trainspec.errors import DataError
from trainspec.text.fields import BadRecord
from trainspec.text.locate import Style, Unlocated, assistant_spans
from trainspec.text.records import Chat, Encoded, Message, Text

__all__ = ["Encoder", "Unlocated"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Calendar(datetime.datetime):
    """The clock of templates: `strftime_now` gives the date of the recipe."""

    today_is = DATE

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Midnight of that date."""
        return datetime.datetime.combine(cls.today_is, datetime.time(), tz)


class Encoder:
    """The tokenizer of a Hugging Face directory, with its own chat template or `chat_template` (the text of one).

    Raises DataError where transformers cannot load them, or the tokenizer gives no offsets of its tokens.
    """

    def __init__(
        self,
        directory: Path,
        chat_template: str | None = None,
        date: datetime.date = DATE,
    ) -> None:
        logging.disable(logging.WARNING)
        self.directory, self.date = directory, date
        self.tokenizer = _load(directory)
        self._template_of = str(directory) if chat_template is None else "data.chat_template"
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.bos: int | None = self.tokenizer.bos_token_id
        self.eos: int | None = self.tokenizer.eos_token_id
        self.pad: int | None = self.tokenizer.pad_token_id
        self.ends = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self.ends |= {self.eos} - {None}
        longest_first = sorted(filter(None, self.tokenizer.added_tokens_encoder), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._styles: dict[str, Style] = {}
        self._exact = _exact_offsets(self.tokenizer, directory)
        self._check_template()

    @property
    def special_tokens(self) -> dict[str, tuple[str, int | None]]:
        """Text and id of each of the special tokens bos, eos, pad and unk that exists."""
        names = ("bos", "eos", "pad", "unk")
        tokens = {name: getattr(self.tokenizer, f"{name}_token") for name in names}
        return {
            n: (str(t), getattr(self.tokenizer, f"{n}_token_id")) for n, t in tokens.items() if t is not None
        }

    def template(self, tools: object = None) -> str | None:
        """The text of the chat template for conversations with or without `tools`; None where there is none."""
        if self.tokenizer.chat_template is None:
            return None
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except (ValueError, TypeError) as error:  # several templates, none of them named default
            raise DataError(f"{self.directory}: {_one_line(error)}") from None

    def encode(self, record: Chat | Text) -> Encoded:
        """One record. Raises BadRecord where the template refuses it, Unlocated where its targets cannot be located."""
        if isinstance(record, Text):
            return self.encode_text(record.stretches, record.turns)
        return self.encode_chat(record.messages, record.tools, record.learnt)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        learnt: Sequence[bool] | None = None,
    ) -> Encoded:
        """A conversation in Hugging Face's form. `learnt` marks the messages to train on, by default all the assistant's."""
        if not messages:
            return Encoded([], [])
        template = self.template(tools)
        if template is None:
            raise BadRecord("no chat template; set data.chat_template")
        learnt = learnt if learnt is not None else [m["role"] == "assistant" for m in messages]
        text, chosen, turns = self._located(messages, tools, template, learnt)
        ids, offsets = self._tokens(text, special=False)
        counts = _mask(offsets, chosen)
        return Encoded(
            ids,
            counts,
            [at for at in (_token_at(offsets, turn) for turn in turns) if at],
            [*self._notes(text, messages, tools, template), *self._doubled(ids)],
        )

    def _doubled(self, ids: Sequence[int]) -> list[str]:
        is_doubled = len(ids) > 1 and ids[0] == ids[1] == self.bos
        return ["begins with two begin tokens, as its chat template writes it"] if is_doubled else []

    def encode_text(self, stretches: Sequence[tuple[str, bool]], turns: Sequence[int] = ()) -> Encoded:
        """Stretches of text joined, with the special tokens that the tokenizer adds and an end token."""
        text, spans, starts = "", [], []
        for i, (stretch, counts) in enumerate(stretches):
            if i in turns and text:
                starts.append(len(text))
            if counts:
                spans.append((len(text), len(text) + len(stretch)))
            text += stretch
        ids, offsets = self._tokens(text, special=True)
        counts, notes = _mask(offsets, spans), []
        is_open = bool(stretches) and stretches[-1][1]
        # Special tokens that the tokenizer adds after the text also end the response.
        last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1)
        for i in range(last + 1, len(ids)):
            counts[i] = is_open and last >= 0 and counts[last]
        if len(ids) > 1 and ids[0] == ids[1] == self.bos:
            del ids[0], counts[0], offsets[0]
            counts[0] = False
            notes.append("had its begin token already")
        if len(ids) > 1 and ids[-1] == ids[-2] == self.eos:
            del ids[-1], counts[-1], offsets[-1]
        elif self.eos is not None and (not ids or ids[-1] != self.eos):
            # A target only after another: a record with an empty response has none.
            counts.append(is_open and bool(counts) and counts[-1])
            ids.append(self.eos)
        return Encoded(ids, counts, [at for at in (_token_at(offsets, s) for s in starts) if at], notes)

    def encode_prompt(self, record: Chat | Text) -> tuple[list[int], str]:
        """The ids and the text of everything before a record's last response, which is empty.

        A conversation ends with the template's generation prompt, as `apply_chat_template(add_generation_prompt=True)` does.
        Raises BadRecord where the template refuses it.
        """
        if isinstance(record, Chat):
            template = self.template(record.tools)
            if template is None:
                raise BadRecord("no chat template; set data.chat_template")
            plain = [{k: v for k, v in m.items() if v is not None} for m in record.messages[:-1]]
            [text], _ = self._render([plain], record.tools, template, prompt=True)
            return self._tokens(text, special=False)[0], text
        stretches = record.stretches
        # Text to be continued has no response; a written-out conversation has an empty turn, and the blank after it.
        if len(stretches) > 1 and not stretches[-1][0].strip():
            stretches = stretches[:-1]
        text = "".join(stretch for stretch, _ in stretches)
        ids, offsets = self._tokens(text, special=True)
        # What the tokenizer adds after a text would end it.
        last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1)
        ids = ids[: last + 1] if text else []
        return (ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.bos else ids), text

    @property
    def stops(self) -> list[int]:
        """The ids that end a response: the end token, and what the chat template writes after an answer."""
        stops = set() if self.eos is None else {self.eos}
        try:
            if self.template() is not None:
                example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
                encoded = self.encode_chat(example)
                learnt = [i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
                stops |= set(learnt[-1:]) & self.ends
        except (BadRecord, Unlocated):  # a template that asks for more than a question and an answer
            pass
        return sorted(stops)

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """The ids of those texts that are special tokens: what `said` leaves out."""
        special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        return [special[text] for text in texts if text in special]

    def said(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, with the special tokens that the tokenizer itself adds."""
        return self._tokens(text, special=True)[0]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary piece of each id."""
        return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _tokens(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and their character offsets, which are empty for special tokens that the tokenizer adds."""
        exact = self._exact.encode(text, add_special_tokens=False)
        if not special:
            return exact.ids, exact.offsets
        encoding = self.tokenizer(
            text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
        )
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        front = encoding["special_tokens_mask"].index(0) if 0 in encoding["special_tokens_mask"] else 0
        if ids[front : front + len(exact.ids)] == exact.ids:
            offsets[front : front + len(exact.ids)] = exact.offsets
        return ids, offsets

    def _check_template(self) -> None:
        templates = self.tokenizer.chat_template
        if templates is None:
            return
        for source in templates.values() if isinstance(templates, dict) else [templates]:
            if not isinstance(source, str):
                raise DataError(f"{self._template_of}: a chat template must be text, not {source!r:.80}")
            try:
                render_jinja_template(conversations=[], chat_template=source)
            except Exception as error:
                line = f" line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
                raise DataError(f"{self._template_of}: chat template{line}: {_one_line(error)}") from None

    def _render(
        self, conversations: Sequence[Sequence[Message]], tools: Any, template: str, *, prompt: bool = False
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Each conversation as text, and the spans that the template marks as the assistant's."""
        _Calendar.today_is = self.date
        chat_template_utils.__dict__["datetime"] = _Calendar
        render: Any = render_jinja_template  # its annotation omits the second result
        try:
            texts, marked = render(
                conversations=conversations,
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=_has_tags(template),
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
            for text in texts:
                text.encode()  # fails on half of a surrogate pair
            return texts, marked
        except Exception as error:  # templates raise their own refusals and errors of every kind
            raise BadRecord(f"chat template: {_one_line(error)}") from None

    def _located(
        self, messages: Sequence[Message], tools: Any, template: str, learnt: Sequence[bool]
    ) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The text of a conversation, the character spans of its targets, and where turns begin."""
        # As in apply_chat_template, keys without a value are left out.
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        wanted = [flag for flag, m in zip(learnt, messages, strict=True) if m["role"] == "assistant"]
        if _has_tags(template):
            [text], [marked] = self._render([plain], tools, template)
            if len(marked) != len(wanted) and not all(wanted):
                raise Unlocated("the template's {% generation %} marks another number of turns")
            chosen = [span for i, span in enumerate(marked) if i >= len(wanted) or wanted[i]]
            return text, chosen, [_skip_blank(text, end) for _, end in marked]
        renders = _Renders(lambda some, prompt: self._render(some, tools, template, prompt=prompt)[0], plain)
        spans = assistant_spans(renders.text, plain, renders.render, self._style(template))
        chosen = [(s.start, s.end) for s, flag in zip(spans, wanted, strict=True) if flag]
        return renders.text, chosen, [span.next_turn for span in spans]

    def _style(self, template: str) -> Style:
        """What the template writes around an answer, cached per template."""

        def render(messages: Sequence[Message], prompt: bool) -> str | None:
            try:
                return self._render([messages], None, template, prompt=prompt)[0][0]
            except BadRecord:
                return None

        if template not in self._styles:
            self._styles[template] = Style.of(render, self._added)
        return self._styles[template]

    def _notes(self, text: str, messages: Sequence[Message], tools: Any, template: str) -> list[str]:
        notes = []
        if tools and "tools" not in template:
            notes.append("has tools, of which the template says nothing")
        for message in messages:
            said = [message.get(k) for k in ("content", "reasoning_content", "reasoning", "thinking")]
            if any(isinstance(words, str) and not _is_written(words, text) for words in said):
                notes.append("loses text in the template")
                break
        calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]
        if any(call["name"] not in text for call in calls):
            notes.append("loses tool calls in the template")
        return notes


class _Renders:
    """A conversation and its prefixes as text, rendered in one call where the template accepts all of them."""

    def __init__(
        self, render: Callable[[Sequence[Sequence[Message]], bool], list[str]], messages: list[Message]
    ) -> None:
        self._render = render
        stops = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self._known: dict[tuple[int, bool], str] = {}
        self._length = len(messages)
        self._messages = messages
        for prompt, lengths in ((False, sorted({*(i + 1 for i in stops), self._length})), (True, stops)):
            lengths = [n for n in lengths if n]
            try:
                texts = render([messages[:n] for n in lengths], prompt) if lengths else []
            except BadRecord:  # it refuses one of them: render each on demand
                continue
            self._known |= {(n, prompt): text for n, text in zip(lengths, texts, strict=True)}

    @property
    def text(self) -> str:
        """The text of the whole conversation. Raises BadRecord."""
        known = self._known.get((self._length, False))
        return self._render([self._messages], False)[0] if known is None else known

    def render(self, some: Sequence[Message], prompt: bool) -> str | None:
        """Messages as text; None where the template refuses them."""
        is_beginning = all(mine is message for mine, message in zip(some, self._messages, strict=False))
        known = self._known.get((len(some), prompt)) if is_beginning else None
        if known is not None:
            return known
        try:
            return self._render([some], prompt)[0]
        except BadRecord:
            return None


def _has_tags(template: str) -> bool:
    return _GENERATION.search(template) is not None


def _load(directory: Path) -> Any:
    try:
        with _silence():
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            tokenizer("a")  # a special token that it adds may be missing
    except BaseException as error:  # damaged files raise exceptions of every kind
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        way_out = "set data.tokenizer to a directory that has one"
        if (directory / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            way_out = "its tokenizer.model is read with the package sentencepiece: pip install sentencepiece"
        raise DataError(
            f"{directory}: transformers cannot load its tokenizer ({_one_line(error)}); {way_out}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{directory}: {type(tokenizer).__name__} gives no offsets of its tokens; "
            "save it with a tokenizer.json"
        )
    return tokenizer


def _exact_offsets(tokenizer: Any, directory: Path) -> Tokenizer:
    """The same tokenizer without the special tokens it adds, and without the step that trims blanks off offsets."""
    try:
        exact = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # it loads even where two tokens have one id
        raise DataError(f"{directory}: tokenizer.json is damaged ({_one_line(error)})") from None
    exact.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    exact.encode_special_tokens = tokenizer.split_special_tokens
    exact.no_truncation()
    exact.no_padding()
    return exact


@contextmanager
def _silence() -> Iterator[None]:
    """Silence stderr: a panic of the tokenizers library prints its stack before it becomes an exception."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the tokenizers library, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}" if text else type(error).__name__


def _is_written(words: str, text: str) -> bool:
    """Whether the template has kept `words`, as they are or as JSON."""
    words = words.strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Marks, for each span, the tokens from the first to the last that overlap it."""
    counts = [False] * len(offsets)
    at = 0
    for start, stop in spans:
        while at < len(offsets) and offsets[at][1] <= start:
            at += 1
        first, last = at, at - 1
        for i in range(at, len(offsets)):
            begin, end = offsets[i]
            if begin >= stop:
                break
            if end > begin:
                last = i
        counts[first : last + 1] = [True] * (last + 1 - first)
        at = max(at, last)
    return counts


def _token_at(offsets: Sequence[tuple[int, int]], character: int) -> int | None:
    """The first token that begins at or after a character."""
    return next((i for i, (start, end) in enumerate(offsets) if start >= character and end > start), None)
