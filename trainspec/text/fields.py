"""The fields of a record: their texts, and the answers of an instruction record, which may be several or a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The fields of SQuAD's `answers`, and the one of these that is used.
SQUAD_ANSWERS, ANSWER_TEXTS = ("text", "answer_start"), "text"


class BadRecord(Exception):
    """A record is malformed; the text says what is wrong and the way out, without the location in the file."""


def with_output(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record with a list of all right outputs as `references`, which begins with `output`. Raises BadRecord."""
    if "references" not in fields or "instruction" not in fields:
        return fields
    references = fields["references"]
    if (
        isinstance(references, dict)
        and ANSWER_TEXTS in references
        and not references.keys() - {*SQUAD_ANSWERS}
    ):
        references = references[ANSWER_TEXTS]
    references = texts_of(references, "references")
    output = fields.get("output", references[0] if references else None)
    if output is None:
        raise BadRecord("'references' is empty, and there is no 'output'; give an answer to learn")
    every = dict.fromkeys([output, *references] if isinstance(output, str) else references)
    return fields | {"output": output, "references": list(every)}


def choices_of(fields: Mapping[str, Any]) -> list[str]:
    """The choices of a record, which may have none. Raises BadRecord."""
    if "choices" not in fields:
        return []
    choices = texts_of(fields["choices"], "choices")
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(map(str.strip, choices)):
        raise BadRecord(f"'choices' are two or more different texts, not {choices!r:.80}")
    if "references" in fields:
        raise BadRecord("'references' beside 'choices', of which one is right: the 'output'; leave them out")
    if "output" in fields and fields["output"] not in choices:
        raise BadRecord(f"the output {fields['output']!r:.40} is none of the 'choices'")
    return choices


def texts_of(value: object, name: str) -> list[str]:
    """The texts of a list, which is the field `name`. Raises BadRecord."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRecord(f"{name!r} must be a list of texts, not {value!r:.80}")
    return value


def kind_of(value: object) -> str:
    """What a value of JSON is, for a message."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """The text of a field. Raises BadRecord."""
    if not isinstance(fields[key], str):
        raise BadRecord(f"{key!r} must be text, not {fields[key]!r:.80}")
    return fields[key]


def parsed(text: str, what: str) -> Any:
    """The value of a JSON text. Raises BadRecord."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} are not JSON: {text!r:.80}") from None
