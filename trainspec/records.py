"""Records as people keep them (jsonl, plain text), rendered into segments of text that do or do not count.

{"instruction": ..., "input": ..., "output": ...}       `input` may be absent
{"messages": [{"role": "user", "content": ...}, ...]}   every assistant turn counts
{"text": ...}                                           task `text`: all of it counts
a .txt file                                             task `text`: documents separated by blank lines
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainspec.errors import DataError, nearest

Task = Literal["question_answering", "summarisation", "translation", "reading_comprehension", "text"]

ROLES = ("system", "user", "assistant", "tool")
# How an instruction record reads, by task: lines, of which that of an absent input falls out. The response follows
# on a line of its own.
PROMPTS: dict[Task, tuple[str, ...]] = {
    "question_answering": ("Question: {instruction}", "{input}", "Answer:"),
    "summarisation": ("{instruction}", "{input}", "Summary:"),
    "translation": ("{instruction}", "{input}", "Translation:"),
    "reading_comprehension": ("{input}", "Question: {instruction}", "Answer:"),
}


@dataclass(frozen=True)
class Segment:
    """A stretch of text; `counts` says whether the loss is taken on it."""

    text: str
    counts: bool


@dataclass(frozen=True)
class Rendered:
    """One record as text. `closed`: the template has written its own begin and end tokens already."""

    segments: tuple[Segment, ...]
    closed: bool = False

    @property
    def empty(self) -> bool:
        """No text at all in it."""
        return not any(s.text.strip() for s in self.segments)


def read_records(path: Path, *, task: Task, chat: ChatTemplate | None) -> Iterator[Rendered]:
    """Every record of a file, in order. Raises DataError with the line number where one is malformed."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.train and data.heldout name a .jsonl or .txt file")
    try:
        if path.suffix == ".txt":
            if task != "text":
                raise DataError(
                    f"{path}: a .txt file holds plain text; set data.task=text, or give a .jsonl file"
                )
            yield from _documents(path)
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _render(_parse(line, f"{path} line {number}"), f"{path} line {number}", task, chat)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _documents(path: Path) -> Iterator[Rendered]:
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        if block.strip():
            yield Rendered((Segment(block.strip() + "\n", counts=True),))


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record is a JSON object, not {type(record).__name__}")
    return record


def _render(record: dict[str, Any], where: str, task: Task, chat: ChatTemplate | None) -> Rendered:
    if "messages" in record:
        messages = _messages(record["messages"], where)
        return chat.render(messages, where) if chat else _plain_chat(messages)
    if task == "text":
        return Rendered((Segment(_text(record, "text", where), counts=True),))
    for key in ("instruction", "output"):
        if key not in record:
            way_out = (
                "set data.task=text"
                if "text" in record
                else "a record has instruction, input and output, or messages"
            )
            raise DataError(
                f"{where}: no {key!r} among {', '.join(map(repr, record)) or 'no keys'}; {way_out}"
            )
    fields = {
        key: _text(record, key, where) if key in record else "" for key in ("instruction", "input", "output")
    }
    if not fields["instruction"].strip() and not fields["input"].strip():
        return Rendered(())
    texts = {key: value.strip() for key, value in fields.items()}
    lines = [line for line in PROMPTS[task] if texts["input"] or line != "{input}"]
    prompt = "".join(line.format(**texts) + "\n" for line in lines)
    return Rendered((Segment(prompt, counts=False), Segment(fields["output"].strip(), counts=True)))


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, not {value!r}")
    return value


def _messages(value: object, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: 'messages' must be a list")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(
                f"{where}: every message needs a text 'role' and a text 'content', not {message!r}"
            )
        if message["role"] not in ROLES:
            raise DataError(f"{where}: unknown role {message['role']!r}{nearest(message['role'], ROLES)}")
    return value


def _plain_chat(messages: list[dict[str, str]]) -> Rendered:
    segments: list[Segment] = []
    for message in messages:
        segments.append(Segment(f"{message['role'].capitalize()}:\n", counts=False))
        segments.append(Segment(message["content"].strip() + "\n", counts=message["role"] == "assistant"))
    return Rendered(tuple(segments))


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant says; turns are told apart without it."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The checkpoint's own jinja chat template, run in a sandbox."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.globals["raise_exception"] = _raise_template_error
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"chat template of the tokenizer: {error}") from None

    def render(self, messages: list[dict[str, str]], where: str) -> Rendered:
        """Assistant turns count, with whatever the template writes to end them."""
        segments: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._text(messages[:i], True, where), self._text(messages[: i + 1], False, where)
            if not before.startswith(done) or not after.startswith(before):
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns, so no part of it can be masked"
                )
            segments += [
                Segment(before[len(done) :], counts=False),
                Segment(after[len(before) :], counts=True),
            ]
            done = after
        return Rendered(tuple(segments), closed=True)

    def _text(self, messages: list[dict[str, str]], add_generation_prompt: bool, where: str) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: chat template: {error}") from None


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
