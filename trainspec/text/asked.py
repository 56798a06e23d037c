"""A record as it is asked: with nothing in its response's place, and what would have been right apart from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainspec.text.fields import BadRecord, choices_of, kind_of, text_of
from trainspec.text.records import Reader


class Unanswered(NamedTuple):
    """A record under our names with an empty response, the response that it had, all that are right, and the choices."""

    record: dict[str, Any]
    reference: str | None
    references: list[str]
    choices: list[str]


def without_response(record: object, reader: Reader) -> Unanswered:
    """A record as it is asked. Raises BadRecord.

    A response may be absent: a list of messages may end with the user's turn.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a record is a JSON object, not {kind_of(record)}")
    fields = reader.renamed(record)
    if "instruction" in fields:
        reference = text_of(fields, "output") if "output" in fields else None
        references = fields.get("references") or [reference]
        choices = choices_of(fields)
        asked = {key: value for key, value in fields.items() if key not in ("references", "choices")}
        return Unanswered(
            asked | {"output": ""}, reference, [r for r in references if r is not None], choices
        )
    asked, reference = _without_last_response(fields, reader)
    return Unanswered(asked, reference, [] if reference is None else [reference], [])


def _without_last_response(fields: dict[str, Any], reader: Reader) -> tuple[dict[str, Any], str | None]:
    """The fields of any other record with an empty response, and the one that it had."""
    if reader.task == "text" and "text" in fields:
        return fields, None
    for name in ("messages", "conversations"):
        if name in fields:
            turns, reference = _without_last_answer(fields[name], name)
            return fields | {name: turns}, reference
    if isinstance(fields.get("prompt"), list):
        completion = fields.get("completion") or [{"content": None}]
        reference = completion[-1].get("content") if isinstance(completion[-1], dict) else None
        return fields | {"completion": [_no_answer("messages")]}, reference
    response = "completion" if "prompt" in fields else "output"
    reference = fields.get(response)
    if reference is not None and not isinstance(reference, str):
        raise BadRecord(f"{response!r} must be text, not {reference!r:.80}")
    return fields | {response: ""}, reference


def _without_last_answer(value: object, name: str) -> tuple[list[Any], str | None]:
    """Turns up to the last one of the assistant, which is empty, and what that said."""
    if not isinstance(value, list):
        raise BadRecord(f"{name!r} must be a list of turns, not {kind_of(value)}")
    last = value[-1] if value and isinstance(value[-1], dict) else {}
    is_answer = last.get("role") == "assistant" or last.get("from") in ("gpt", "assistant", "function_call")
    turns = value[:-1] if is_answer else value
    if not turns:
        raise BadRecord(f"{name!r} has no turn before the answer; give the question")
    reference = (last.get("content") or last.get("value") or None) if is_answer else None
    return [*turns, _no_answer("messages" if "role" in last else name)], reference


def _no_answer(name: str) -> dict[str, Any]:
    if name == "conversations":
        return {"from": "gpt", "value": ""}
    return {"role": "assistant", "content": ""}
