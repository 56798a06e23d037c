"""Damage of values, of texts and of bytes; all drawn from a `random.Random`."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

NESTED = 300
# What takes a value's place. The last ones only in files that can hold them.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, 1.0, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), "", " ", "x", "0", "1", "8", "true", "null", "nan", "1e400", "\n", "a\0b", "\ud800",
    "x\udfffy", "\ufeffx", "é", "\U0001f600", "\u2028", "\x85", "</s>", "{{ x", "../../x", "./", "x" * 3000, "é" * 300,
    [], [None], [1, "x"], [[[]]], ["x" * 50] * 50, ["\ud800"], {}, {"": None}, {"a": 1}, {"x": {"y": [{}]}}, {"\ud800": 1},
    {"__type": "AddedToken"}, {"content": 5, "__type": "AddedToken"}, {"a\0": "x" * 3000},
)  # fmt: skip
LETTERS = "\0\a\t\n\r\x1b\"'{}[]:,#\\%\x7f\x85\xa0\u2028\ufeff\uffff\U0001f600"


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (collection, key or index) below a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inside):
        yield tree, key
        yield from places(value)


def odd(rng: random.Random) -> Any:
    """A value that seldom is the right one."""
    value = copy.deepcopy(rng.choice(ODD))
    if rng.random() < 0.03:
        for _ in range(NESTED):
            value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def near(value: Any, rng: random.Random) -> Any:
    """A value that is nearly the right one, or right in another type."""
    match value:
        case bool():
            return rng.choice((not value, int(value), str(value), str(value).lower(), float(value)))
        case int():
            return rng.choice(
                (value + 1, value * 2, value // 2, -value, float(value), value + 0.5, str(value), bool(value))
            )
        case float() if math.isfinite(value):
            return rng.choice(
                (value * 2, value / 3, 1 - value, -value, int(value), str(value), f"{value:e}", value * 1e30)
            )
        case str():
            return rng.choice(
                (value.upper(), value.title(), f" {value}", f"{value}\n", value[:-1], value * 2, [value])
            )
        case list():
            return rng.choice(
                (
                    value[1:],
                    value[::-1],
                    value * 2,
                    [*value, None],
                    dict.fromkeys(map(str, value)),
                    str(value),
                )
            )
        case dict():
            return rng.choice((list(value), [value], dict(list(value.items())[1:]), str(value)))
        case _:
            return odd(rng)


def damage_values(tree: Any, rng: random.Random, *, keys: tuple[str, ...] = ()) -> Any:
    """A copy with one or two values replaced, removed, renamed, doubled or wrapped; `keys` are those that may be added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        found = list(places(tree))
        if not found:
            return odd(rng)
        inside, key = rng.choice(found)
        match rng.randrange(13):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[rng.choice((str(key).upper(), f"{key}s", f" {key}", "\ud800", "a\0", "x" * 500))] = (
                    inside.pop(key)
                )
            case 2:
                inside[key] = copy.deepcopy(rng.choice([place[0][place[1]] for place in found]))
            case 3:
                inside[key] = rng.choice(
                    ([inside[key]], {"a": inside[key]}, str(inside[key]), [inside[key]] * 3)
                )
            case 4 if isinstance(inside, dict):
                inside[rng.choice(keys) if keys else "new"] = odd(rng)
            case 5 | 6 | 7:
                inside[key] = near(inside[key], rng)
            case 8 if isinstance(inside[key], str):
                inside[key] = damage_text(inside[key], rng)
            case _:
                inside[key] = odd(rng)
    return tree


def damage_text(text: str, rng: random.Random, words: tuple[str, ...] = ()) -> str:
    """With words put in, letters put in, stretches cut out, or lines in another order."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0 | 1 if words:
                found = list(re.finditer(r"[^\s{},:\[\]]+", text)) or [re.match("", text)]
                word = rng.choice(found)
                text = text[: word.start()] + rng.choice(words) + text[word.end() :]
            case 2:
                text = text[:at] + rng.choice(LETTERS) + text[at:]
            case 3:
                text = text[:at] + text[at + rng.randint(1, 12) :]
            case 4:
                text = text[:at]
            case _:
                lines = text.splitlines(keepends=True)
                rng.shuffle(lines)
                text = "".join(lines)
    return text


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """In another encoding, cut, with bytes changed, or with something in front or behind."""
    at = rng.randrange(len(content) + 1)
    text = content.decode("utf-8", "replace")
    match rng.randrange(9):
        case 0:
            return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32")), "replace")
        case 1:
            return (text + "é").encode("latin-1", "replace")
        case 2:
            return b"\xef\xbb\xbf" * rng.randint(1, 2) + content
        case 3:
            return content[:at] + b"\xef\xbb\xbf" + content[at:]
        case 4:
            return content[:at]
        case 5:
            return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        case 6:
            return content[:at] + b"\xff\x00\xed\xa0\x80" + content[at:]
        case 7:
            return rng.choice(
                (b"", b"\0" * 64, b"\n", content + content, b"version https://git-lfs\n", b"<html>")
            )
        case _:
            return content.replace(b"\n", b"\r\n") + b"\x1a"


def written(text: str, rng: random.Random, *, bytes_too: float = 0.15) -> bytes:
    """A text as the bytes of a file, which may be damaged too."""
    content = text.encode("utf-8", "surrogatepass")
    return damage_bytes(content, rng) if rng.random() < bytes_too else content


def json_text(value: Any, rng: random.Random) -> str:
    """As JSON, sometimes with a key given twice, too deep, or with a number that is too long."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 1)))
    if rng.random() < 0.06:
        old = rng.choice(re.findall(r'"[^"\\]*"|\d+|null|true', text) or [text])
        deep = rng.choice((400, 900, 1100, 100_000))
        new = rng.choice(
            (
                "9" * 5000,
                "1e999",
                "-",
                "NaN",
                "[" * deep + "]" * deep,
                '{"a":' * deep + "1" + "}" * deep,
                '"\\ud83d"',
            )
        )
        text = text.replace(old, new, 1)
    return text
