"""Validation errors of a recipe in its author's terms: the setting, its value, and what it should be."""

from __future__ import annotations

import datetime
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from trainspec.errors import meant, nearest
from trainspec.methods import METHODS

# The largest 64-bit integer; a larger number is a typing error.
LARGEST = 2**63 - 1


def format_value(value: Any) -> str:
    """A value as YAML writes it, shortened to fit a line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) > LARGEST:  # Python refuses to print the longest of these
            return f"a number of some {int((abs(value).bit_length() - 1) * math.log10(2)) + 1} digits"
        case datetime.date():
            return str(value)
        case _:
            return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3
# The values of a closed choice, in pydantic's message.
_QUOTED = re.compile(r"'([^']*)'")


# What each of pydantic's error types means to the author of a recipe.
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "date_type": "a date such as 2024-07-26",
    "date_from_datetime_inexact": "a date without a time",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
}


def complaint(error: ValidationError, recipe: type[BaseModel]) -> str:
    """The first error of a `recipe` as one line: `section.key: what is wrong; what is right`."""
    detail = error.errors()[0]
    path = [str(p) for p in detail["loc"]]
    if path[:1] == ["method"] and len(path) > 1 and path[1] in METHODS:
        del path[1]  # the kind that pydantic has chosen
    where = ".".join(path[:2])  # what follows are pydantic's own words, and indices of a list
    message, kind, value = detail["msg"].removeprefix("Value error, "), detail["type"], detail["input"]
    element = detail["loc"][-1] if len(path) > 2 else None
    number = f" (element {element + 1})" if isinstance(element, int) else ""
    if kind == "extra_forbidden":
        return f"{where}: unknown key{nearest(path[-1], _fields(recipe, path[:-1], detail['loc']))}"
    if kind == "missing":
        return f"{where}: missing{number}; the recipe must give it"
    if kind.startswith("union_tag"):
        given = value.get("kind") if isinstance(value, dict) else value
        return f"{where}.kind: {'missing' if given is None else f'unknown kind {format_value(given)}'}; choose one of {', '.join(METHODS)}"
    if kind == "value_error":
        names_itself = message.startswith(tuple(f"{section}." for section in recipe.model_fields))
        return message if names_itself else f"{where}: {message}"
    if kind not in _WANTED:
        hint = meant(str(value), _QUOTED.findall(message)) if kind == "literal_error" else ""
        return f"{where}: {message[0].lower()}{message[1:]}, not {format_value(value)}{number}{hint}"
    # Every branch of a union reports an error: take all that are about this value.
    kinds = [d["type"] for d in error.errors() if d["loc"][0] == detail["loc"][0] and d["input"] is value]
    wanted = " or ".join(dict.fromkeys(_WANTED[k] for k in kinds if k in _WANTED))
    quotes = (
        "; write it in quotes" if wanted == "text" and isinstance(value, int | float | datetime.date) else ""
    )
    return f"{where}: must be {wanted}, not {format_value(value)}{number}{quotes}"


def _fields(recipe: type[BaseModel], path: Sequence[str], loc: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section at `path`."""
    if path == ["method"]:
        section: type[BaseModel] = METHODS[str(loc[1])]
    else:
        section = recipe
        for key in path:
            section = section.model_fields[key].annotation  # type: ignore[assignment]
    return [field.alias or name for name, field in section.model_fields.items()]
