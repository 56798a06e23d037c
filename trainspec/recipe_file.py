"""A recipe's YAML as plain values, with `--set a.b=c` on top; `trainspec.recipe` validates them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainspec.complaint import LARGEST, format_value
from trainspec.errors import RecipeError


def read_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The sections in a YAML file with `a.b=value` overrides on top. Raises RecipeError in one line."""
    tree = read_mapping(
        path,
        advice="give the path of a recipe, such as configs/demo.yaml",
        wanted="a recipe is a mapping of sections such as model, method and data",
    )
    for override in overrides:
        apply_override(tree, override)
    check_usable(tree, path)
    return tree


def read_mapping(path: Path, *, advice: str, wanted: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError in one line, with `advice` for an unreadable file."""
    try:
        tree = _parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; {advice}") from None
    except _NOT_YAML as error:
        raise RecipeError(f"{path}: not YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: {wanted}")
    return tree


def check_usable(tree: dict[str, Any], path: Path) -> None:
    """Raises RecipeError for a value that no setting can have."""
    for key, what in _unusable(tree, "", set()):
        raise RecipeError(f"{path}: {key}: {what}")


# For a scalar that does not fit its tag (2024-13-01, !!int x) PyYAML lets one of Python's own errors through.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `2e-4` is a number instead of a string, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping without duplicate keys."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} is given twice, line {node.start_mark.line + 1} and on")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def apply_override(tree: dict[str, Any], override: str, *, flag: str = "--set") -> None:
    """Give the setting `a.b` of `a.b=value` that value. Raises RecipeError, which names the `flag`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{flag} {override!r}: write KEY=VALUE, such as --set run.steps=10")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"{flag} {override}: {parent!r} is a value, not a section")
    try:
        value = _parse(text)
    except _NOT_YAML as error:
        raise RecipeError(f"{flag} {override}: {text!r} is not a YAML value: {_one_line(error)}") from None
    if key == "method.kind" and node.get("kind", value) != value:
        node.clear()  # another method has other settings: those of the old one do not carry over
    node[leaf] = value


def _unusable(value: Any, key: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Values that no setting can have, with their keys: text that cannot be encoded, integers beyond 64 bits.

    `seen` holds the ids of the collections visited: with anchors, these may contain themselves or one another.
    """
    match value:
        case dict() | list():
            if id(value) in seen:
                return
            seen.add(id(value))
            inside = value.items() if isinstance(value, dict) else ((None, inner) for inner in value)
            for name, inner in inside:
                yield from _unusable(name, key or "a key", seen)
                yield from _unusable(inner, key if name is None else f"{key}.{name}".lstrip("."), seen)
        case str():
            if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
                yield _printable(key), f"{format_value(value)} has a character that is not text"
        case int():
            if abs(value) > LARGEST:
                yield _printable(key), f"{format_value(value)} is larger than any setting"
        case _:
            pass


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
