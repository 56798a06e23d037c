"""Conversations as people have them: `CONVERSATIONS` in Hugging Face's canonical shape, `RAW` in OpenAI's.

Both hold the same conversations under the same names. What differs: OpenAI has content in parts (their texts
are joined without anything between them), `content: null` beside tool calls, and the arguments of a call as a
JSON string. Ids of calls stay in both, since templates read them.
"""

from __future__ import annotations

import json
from typing import Any

Record = dict[str, Any]


def _user(text: str) -> Record:
    return {"role": "user", "content": text}


def _answer(text: str) -> Record:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Record:
    return {"role": "system", "content": text}


def _call(name: str, arguments: Record, **more: str) -> Record:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


WEATHER: Record = {
    "type": "function",
    "function": {
        "name": "weather",
        # Neither the keys' order nor <, >, & and ' may change on the way to the template.
        "description": 'The weather of a town, e.g. "Zürich" & what\'s around it; <b>not</b> of the sea',
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "its name — as people write it"},
                "days": {"type": "integer", "minimum": 1, "default": 1},
                "in": {"type": "string", "enum": ["°C", "°F"]},
            },
            "required": ["town"],
        },
    },
}
SEARCH: Record = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search a page",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
CODE = "    if x < 0:\n\treturn -x  # tab\n\n    return x\n"
JSON_TEXT = '{"b": 1, "a": ["<i>x</i>", "it\'s", "\\n", null], "name": "Zoë \\u00e9"}'

CONVERSATIONS: dict[str, Record] = {
    "one_turn": {"messages": [_user("Name a fruit."), _answer("A pear.")]},
    "system": {"messages": [_system("Be short."), _user("Name a tree."), _answer("An oak.")]},
    "many_turns": {
        "messages": [
            _system("You are a gardener."),
            _user("Hello"),
            _answer("Hello, what can I do?"),
            _user("Which tree grows fast?"),
            _answer("A willow does."),
            _user("And which slowly?"),
            _answer("An oak.\nA yew, too."),
        ]
    },
    "assistant_first": {
        "messages": [_answer("Hello, what can I do?"), _user("Name a fruit."), _answer("A pear.")]
    },
    "two_assistants": {
        "messages": [_user("Count."), _answer("One."), _answer("Two."), _user("More."), _answer("Three.")]
    },
    "user_last": {"messages": [_user("Hi"), _answer("Hello"), _user("Name a fruit.")]},
    "developer": {
        "messages": [{"role": "developer", "content": "Be short."}, _user("Hi"), _answer("Hello")],
    },
    "tools_unused": {
        "messages": [_system("Use tools."), _user("What is 2 + 2?"), _answer("4, without a tool.")],
        "tools": [WEATHER, SEARCH],
    },
    "tool_call": {
        "messages": [
            _user("Is it dry in Rome?"),
            {"role": "assistant", "tool_calls": [_call("weather", {"town": "Rome"}, id="call00001")]},
            {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "call00001"},
            _answer("It is dry."),
        ],
        "tools": [WEATHER],
    },
    "tool_call_with_content": {
        "messages": [
            _system("Use tools."),
            _user("Is it dry in Rome?"),
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [_call("weather", {"town": "Rome", "days": 2}, id="call00001")],
            },
            {"role": "tool", "content": "dry, then wet", "name": "weather", "tool_call_id": "call00001"},
            _answer("It is dry, and wet tomorrow."),
            _user("Thanks."),
            _answer("You're welcome."),
        ],
        "tools": [WEATHER, SEARCH],
    },
    "two_calls": {
        "messages": [
            _user("Rome or Bern?"),
            {
                "role": "assistant",
                "tool_calls": [
                    _call("weather", {"town": "Rome"}, id="call00001"),
                    _call("weather", {"town": "Bern"}, id="call00002"),
                ],
            },
            {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "call00001"},
            {"role": "tool", "content": "wet", "name": "weather", "tool_call_id": "call00002"},
            _answer("Rome."),
        ],
        "tools": [WEATHER],
    },
    "tool_markup": {
        "messages": [
            _user("Search for <b>pears & 'apples'</b>."),
            {
                "role": "assistant",
                "tool_calls": [
                    _call(
                        "search",
                        {
                            "query": "<b>Birnen & 'Äpfel'</b> \"größer\"",
                            "limit": 3,
                            "exact": True,
                            "after": None,
                            "bounds": {"z": 0.5, "a": [-1, "ö"]},
                        },
                        id="call00001",
                    )
                ],
            },
            {
                "role": "tool",
                "content": 'He said "two" & it\'s <b>&amp;</b> 梨子 é: ' + JSON_TEXT,
                "name": "search",
                "tool_call_id": "call00001",
            },
            _answer("Two: <b>pears & 'apples'</b>."),
        ],
        "tools": [SEARCH],
    },
    "call_without_id": {
        "messages": [
            _user("Is it dry?"),
            {"role": "assistant", "tool_calls": [_call("weather", {"town": "Rome"})]},
            {"role": "tool", "content": "dry"},
            _answer("Yes."),
        ]
    },
    "empty": {"messages": [_user(""), _answer("")]},
    "empty_turns": {
        "messages": [
            _user("Say nothing."),
            _answer(""),
            _user(""),
            _answer("Nothing."),
            _user(" \n"),
            _answer(""),
        ]
    },
    "whitespace": {
        "messages": [_user("  "), _answer("\n\n"), _user("\t"), _answer(" "), _user("x"), _answer(" \n \n")]
    },
    "emoji": {
        "messages": [
            _user("Say it with a face 🙂"),
            _answer("👩‍👩‍👧 and 🇨🇭 and e\u0301 n\u0303 — ﬁ ½ 👍🏽"),
            _user("日本語で、お願い。"),
            _answer("\u200bはい。\u00a0梨です 🍐"),
        ]
    },
    "code": {
        "messages": [
            _user("Go on:\n\ndef f(x):\n"),
            _answer(CODE),
            _user("Shorter."),
            _answer("    return abs(x)\n"),
        ]
    },
    "blanks": {
        "messages": [
            _system("  Be short.  "),
            _user("  two   blanks  "),
            _answer("  kept   as they are \n"),
            _user("\n line"),
            _answer(" \nso are lines\n\n"),
        ]
    },
    "crlf": {"messages": [_user("one\r\ntwo\r\n"), _answer("three\r\n\r\nfour\x0bfive\u2028six\r\n")]},
    "think_one": {"messages": [_user("2 + 2?"), _answer("<think>\nadd them\n</think>\n\nIt is 4.")]},
    "think_many": {
        "messages": [
            _user("2 + 2?"),
            _answer("<think>\nadd them\n</think>\n\nIt is 4."),
            _user("3 + 3?"),
            _answer("<think>\nadd them\n</think>\n\nIt is 6."),
            _user("Sure?"),
            _answer("It is 6."),
        ]
    },
    "think_tools": {
        "messages": [
            _user("Is it dry in Rome?"),
            {
                "role": "assistant",
                "content": "<think>\nI have to ask.\n</think>\n\nLet me see.",
                "tool_calls": [_call("weather", {"town": "Rome"}, id="call00001")],
            },
            {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "call00001"},
            _answer("<think>\nIt says dry.\n</think>\n\nIt is dry."),
        ],
        "tools": [WEATHER],
    },
    "reasoning_content": {
        "messages": [
            _user("2 + 2?"),
            _answer("It is 4.") | {"reasoning_content": "two and two"},
            _user("3 + 3?"),
            _answer("It is 6.") | {"reasoning_content": "\nthree\nand three\n"},
        ]
    },
    "think_odd": {
        "messages": [
            _user("<think>?"),
            _answer("<think>\nnever ends"),
            _user("</think>?"),
            _answer("</think>One.</think>Two."),
            _user("And?"),
            _answer("<think>\nnothing to say\n</think>\n\n"),
        ]
    },
    "think_repeated": {
        "messages": [
            _user("6?"),
            _answer("<think>\n6\n</think>\n\n6"),
            _user("<think>\n6\n</think>\n\n6"),
            _answer("<think>\n6\n</think>\n\n6"),
            _user("6?"),
            _answer("<think>\n6\n</think>\n\n6"),
        ]
    },
    "repeated": {
        "messages": [
            _user("Say: A pear."),
            _answer("A pear."),
            _user("A pear."),
            _answer("A pear."),
            _user("A pear. A pear."),
            _answer("A pear. A pear."),
        ]
    },
    "system_repeated": {
        "messages": [
            _system("A pear."),
            _user("A pear."),
            _answer("A pear."),
            _user("A pear.\n\nA pear."),
            _answer("A pear."),
        ]
    },
    "two_systems": {
        "messages": [
            _system("Be short."),
            _user("Hi"),
            _answer("Hello"),
            _system("Be long."),
            _user("Hi"),
            _answer("Hello!"),
        ]
    },
    "tool_last": {
        "messages": [
            _user("Is it dry in Rome?"),
            {"role": "assistant", "tool_calls": [_call("weather", {"town": "Rome"}, id="call00001")]},
            {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "call00001"},
        ],
        "tools": [WEATHER],
    },
    "echo": {
        "messages": [
            _user("a"),
            _answer("a"),
            _user("user"),
            _answer("assistant"),
            _user("model"),
            _answer("user"),
        ]
    },
    "special_text": {
        "messages": [
            _user("How does a turn end? <|im_end|>"),
            _answer("With </s> or <|im_end|>\n<|im_start|>assistant\nand [/INST] or <|eot_id|> behind it."),
            _user("And <s>?"),
            _answer("<s>[INST] begins.</s>"),
        ]
    },
    "short": {
        "messages": [_user("3 + 4?"), _answer("7"), _user("7 - 6?"), _answer("1"), _user("7"), _answer("7")]
    },
}


def _in_parts(text: str) -> list[Record]:
    # Cut in the middle of a word: whoever puts anything between two parts changes the text.
    half = len(text) // 2
    return [{"type": "text", "text": piece} for piece in (text[:half], text[half:]) if piece]


def _raw(message: Record) -> Record:
    raw = dict(message)
    if "tool_calls" in message:
        raw["content"] = message.get("content")
        raw["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    elif message["role"] != "tool" and message["content"]:
        raw["content"] = _in_parts(message["content"])
    return raw


def _raw_record(record: Record) -> Record:
    return record | {"messages": [_raw(message) for message in record["messages"]]}


RAW: dict[str, Record] = {name: _raw_record(record) for name, record in CONVERSATIONS.items()}
