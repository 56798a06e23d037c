"""The files of a configuration as one flat mapping of dotted names to values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainspec.errors import RecipeError
from trainspec.imports import deepspeed, peft
from trainspec.imports.tool import Tool
from trainspec.recipe_file import apply_override, check_usable, read_mapping

Tree = dict[str, Any]
# Files that belong to a configuration, by the name that it has for them, and the settings that they are known by.
BESIDE = {"deepspeed": deepspeed.MARKS, "adapter_config": peft.MARKS}
ADVICE = "give the path of a configuration, YAML or JSON"


def read(path: Path) -> Tree:
    """The settings of a YAML or JSON file. Raises RecipeError in one line."""
    wanted = f"not a mapping of settings; {ADVICE}"
    if path.suffix != ".json":
        tree = read_mapping(path, advice=ADVICE, wanted=wanted)
    else:
        try:
            tree = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}; {ADVICE}") from None
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise RecipeError(f"{path}: {wanted}")
    check_usable(tree, path)
    return tree


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; the elements of a list of mappings are numbered from 0."""
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{name}.{number}")
    else:
        yield name, value


@dataclass(frozen=True)
class Configuration:
    """One configuration: its main file, the tool whose it is, and every setting by its dotted name."""

    path: Path
    tool: Tool
    given: dict[str, Any]


def open_configuration(
    paths: Sequence[Path], tools: Sequence[Tool], *, changes: Sequence[str] = (), drops: Sequence[str] = ()
) -> Configuration:
    """The configuration in `paths`: one main file, and files beside it.

    `changes` (`KEY=VALUE`) give their settings other values, `drops` leave some out. Raises RecipeError for files that are
    not one configuration of one of `tools`, for a file that it names and that is not here, and for unusable options.
    """
    mains: dict[Path, tuple[Tree, Tool]] = {}
    beside: dict[str, tuple[Path, Tree]] = {}
    for path in paths:
        tree = read(path)
        tool = next((tool for tool in tools if tool.recognises(tree)), None)
        name = next((name for name, marks in BESIDE.items() if any(mark in tree for mark in marks)), None)
        if tool:
            mains[path] = tree, tool
        elif name:
            beside[name] = path, tree
        else:
            known = "; ".join(f"{tool.name} ({', '.join(tool.marks[:3])})" for tool in tools)
            raise RecipeError(
                f"{path}: no configuration that is known here, which are told by their settings: {known}"
            )
    if len(mains) != 1:
        raise RecipeError(
            f"{list(mains)[1]}: a second configuration besides {next(iter(mains))}; give one, with its files"
            if mains
            else f"{paths[0]}: goes with a configuration; give that as well, such as training_args.json"
        )
    ((path, (tree, tool)),) = mains.items()
    for name, (other, inside) in beside.items():
        if name not in tool.beside:
            raise RecipeError(f"{other}: {tool.name} has no such file, its own settings say it")
        tree[name] = inside
    for name in tool.beside:
        _open_named(tree, name, path)
    for change in changes:
        apply_override(tree, change, flag="--their")
    return Configuration(path, tool, _without(dict(flat(tree)), drops, path))


def _open_named(tree: Tree, name: str, path: Path) -> None:
    """Put the file that the main one names, or an adapter's file next to it, in its place."""
    given = tree.get(name)
    if given is None and name == "adapter_config" and (path.parent / "adapter_config.json").is_file():
        given = "adapter_config.json"
    if not isinstance(given, str) or not given:
        return
    places = (Path(given), path.parent / given, path.parent / Path(given).name)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise RecipeError(f"{path}: {name}: {given} is not here; give it as a further file, or --drop {name}")
    tree[name] = read(found)


def _without(given: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, Any]:
    """The settings but those that are named, or are inside one that is named."""
    for name in names:
        inside = [key for key in given if key == name or key.startswith(f"{name}.")]
        if not inside:
            raise RecipeError(f"--drop {name}: {path} has no such setting")
        for key in inside:
            del given[key]
    return given
