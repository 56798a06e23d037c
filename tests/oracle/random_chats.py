"""Conversations made of what goes wrong: end tokens, headers and thoughts as text, nothing, blanks, repetitions."""

from __future__ import annotations

import random
from collections.abc import Iterator

from oracle.conversations import WEATHER, Record

PIECES = (
    "",
    " ",
    "\n",
    "\n\n",
    "A pear.",
    "A pear.",
    "7",
    "7",
    "<think>\nx\n</think>\n\ny",
    "<think>\n\n</think>\n\n",
    "x</think>",
    "<think>",
    "user",
    "assistant",
    "\nassistant\n",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "</s>",
    "<|end|>",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<｜Assistant｜>",
    "ASSISTANT:",
    '{"name": 1}',
    "  two  blanks",
    "two lines\n\n",
    "é🙂",
    "This is a longer text than the others are.\nIt has lines.",
)


def random_records(number: int, *, seed: int) -> Iterator[Record]:
    """`number` records in Hugging Face's canonical shape."""
    choose = random.Random(seed)
    for _ in range(number):
        yield _record(choose)


def _record(choose: random.Random) -> Record:
    messages, previous = [], "assistant" if choose.random() < 0.9 else "user"
    tools = False
    if choose.random() < 0.3:
        messages.append({"role": "system", "content": choose.choice(PIECES)})
    for _ in range(choose.randint(1, 7)):
        follows = {"assistant": ("user",), "user": ("assistant",), "tool": ("assistant", "assistant", "tool")}
        role = choose.choice(follows[previous] if choose.random() < 0.88 else ("user", "assistant"))
        message: Record = {"role": role, "content": choose.choice(PIECES)}
        if role == "tool":
            message |= {"name": "weather", "tool_call_id": "call00001"}
        if role == "assistant" and choose.random() < 0.1:
            message["reasoning_content"] = choose.choice(PIECES)
        if role == "assistant" and choose.random() < 0.2:
            message["tool_calls"] = [_call(choose) for _ in range(choose.choice((1, 1, 1, 2)))]
            tools = tools or choose.random() < 0.8
            if choose.random() < 0.6:
                del message["content"]
        messages.append(message)
        previous = role
        if "tool_calls" in message and choose.random() < 0.85:
            answer = {"content": choose.choice(PIECES), "name": "weather", "tool_call_id": "call00001"}
            messages.append({"role": "tool", **answer})
            previous = "tool"
    return {"messages": messages} | ({"tools": [WEATHER]} if tools else {})


def _call(choose: random.Random) -> Record:
    function = {"name": choose.choice(("weather", "search")), "arguments": {"town": choose.choice(PIECES)}}
    return {"type": "function", "function": function, "id": "call00001"}
