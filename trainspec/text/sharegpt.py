"""ShareGPT's conversations as OpenAI's messages."""

from __future__ import annotations

from typing import Any

from trainspec.errors import nearest
from trainspec.text.fields import BadRecord, kind_of, parsed

ROLES = ("system", "developer", "user", "assistant", "tool")
# The roles of ShareGPT's conversations.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    **{role: role for role in ROLES},
}


def from_sharegpt(value: object) -> list[dict[str, Any]]:
    """The messages of `conversations`. Raises BadRecord."""
    if not isinstance(value, list):
        raise BadRecord(f"'conversations' must be a list, not {kind_of(value)}")
    messages: list[dict[str, Any]] = []
    for turn in value:
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            messages.append(turn)  # OpenAI's messages under ShareGPT's name
            continue
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise BadRecord(f"every turn needs 'from' and 'value', not {turn!r:.80}")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise BadRecord(
                f"unknown 'from' {turn['from']!r:.40}{nearest(str(turn['from']), SHAREGPT_ROLES)}"
            )
        if more := [name for name in ("role", "content", "tool_calls") if name in turn]:
            raise BadRecord(f"{more[0]!r} as well as 'from' and 'value'; leave one of them out")
        message = {k: v for k, v in turn.items() if k not in ("from", "value")}
        message["role"] = SHAREGPT_ROLES[turn["from"]]
        if turn["from"] == "function_call":
            calls = (
                parsed(turn["value"], "the calls of a 'function_call'")
                if isinstance(turn["value"], str)
                else turn["value"]
            )
            message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        else:
            message["content"] = turn["value"]
        messages.append(message)
    return messages
