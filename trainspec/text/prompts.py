"""Prompts as token ids: what a record of training has before its response. Used by the worker process only.

A prompt is written as a record of `data.train` is, with nothing in its response's place: the same fields, the same task and chat
template. A response that a record has is its reference, and no part of the prompt; a choice is a record with the choice as
its response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainspec.errors import DataError
from trainspec.text.asked import without_response
from trainspec.text.fields import BadRecord
from trainspec.text.files import Raw, read_raw
from trainspec.text.locate import Unlocated
from trainspec.text.records import Chat, Encoded, Reader, Text

_SHOWN_ERRORS = 5


class PromptEncoder(Protocol):
    """What is asked of an encoder here."""

    def template(self, tools: object = None) -> str | None:
        """The text of the chat template, if there is one."""
        ...

    def encode_prompt(self, record: Chat | Text) -> tuple[list[int], str]:
        """The ids and the text of everything before the response."""
        ...

    def encode(self, record: Chat | Text) -> Encoded:
        """A whole record."""
        ...


class EmptyPrompt(BadRecord):
    """A record with nothing before its response."""


def prompts(request: dict[str, Any], encoder: PromptEncoder, reader: Reader) -> dict[str, Any]:
    """Text, ids, references and choices of every prompt, the records that are left out, and how many records there are.

    The prompts are those of a file's records, or of `request["texts"]`. Raises DataError for all malformed records at once.
    """
    source, first, made, left_out, errors, records = request["source"], request["first"], [], [], [], 0
    for number, raw in enumerate(read_raw(source) if source else _typed(request, reader), 1):
        records = number
        if first is not None and number > first:  # it is counted
            continue
        try:
            value = raw.value()
            if request["as_trained"]:
                _check_trained(reader.read(value, encoder.template))
            made.append({"number": number} | _prompt(value, encoder, reader))
        except (BadRecord, Unlocated) as error:
            line = f"{raw.where}: {error}"
            if _is_left_out(error, request):
                left_out.append({"number": number, "why": line})
            else:
                errors.append(line)
    if errors:
        raise DataError(f"{source or '--prompt'} {_in_one_line(errors)}")
    if not made and (first is None or records <= first):
        why = f": {_in_one_line([record['why'] for record in left_out])}" if left_out else ""
        raise DataError(f"{source}: has no prompt{why}; give a record in each line")
    return {"prompts": made, "left_out": left_out, "records": records}


def _check_trained(record: Chat | Text) -> None:
    if isinstance(record, Text) and record.is_blank:
        raise EmptyPrompt("the record is empty")


def _is_left_out(error: BadRecord | Unlocated, request: dict[str, Any]) -> bool:
    """Whether training would leave the record out, too."""
    is_bad = isinstance(error, BadRecord) and not isinstance(error, EmptyPrompt)
    return request["as_trained"] and (not is_bad or request["bad_records"] == "skip")


def _in_one_line(errors: Sequence[str]) -> str:
    more = f"; and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
    return f"{'; '.join(errors[:_SHOWN_ERRORS])}{more}"


def _prompt(value: Any, encoder: PromptEncoder, reader: Reader) -> dict[str, Any]:
    asked, ours = without_response(value, reader), reader.renamed_already()
    ids, text = encoder.encode_prompt(ours.read(asked.record, encoder.template))
    if not ids:
        raise EmptyPrompt("the prompt is empty; write something to continue")
    chosen = [ours.read(asked.record | {"output": choice}, encoder.template) for choice in asked.choices]
    return {
        "prompt": _said(asked.record) or text,
        "ids": ids,
        "reference": asked.reference,
        "references": asked.references,
        "choices": [
            _choice(choice, encoder.encode(record))
            for choice, record in zip(asked.choices, chosen, strict=True)
        ],
    }


def _choice(text: str, encoded: Encoded) -> dict[str, Any]:
    if True not in encoded.counts:
        raise BadRecord(f"the choice {text!r:.40} has no token to measure; leave it out")
    return {"text": text, "ids": encoded.ids, "first": encoded.counts.index(True)}


def _typed(request: dict[str, Any], reader: Reader) -> Iterator[Raw]:
    """Texts as records of the shape that the training data have; where these cannot be read, of the task's."""
    shape = _shape_of(request["like"], reader)
    for number, text in enumerate(request["texts"], 1):
        record = {
            "text": {"text": text},
            "messages": {"messages": [{"role": "user", "content": text}]},
            "conversations": {"messages": [{"role": "user", "content": text}]},
            "prompt and completion": {"prompt": text},
        }.get(shape, {"instruction": text})
        yield Raw(f"text {number}", record, False)


def _shape_of(source: str | None, reader: Reader) -> str:
    """The shape of the first record of a file."""
    try:
        if source and Path(source).exists():
            return reader.shape_of(next(read_raw(source)).value())
    except (BadRecord, DataError, OSError, StopIteration):
        pass  # whoever trains on it is told
    return "text" if reader.task == "text" else "instruction"


def _said(record: dict[str, Any]) -> str | None:
    """The prompt as its writer would name it; None for a conversation or an instruction with an input."""
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    if isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record.get("instruction"), str) and not record.get("input"):
        return record["instruction"]
    messages = record.get("messages")
    if isinstance(messages, list) and len(messages) == 2 and isinstance(messages[0].get("content"), str):
        return messages[0]["content"]  # a question, and the place of its answer
    return None
