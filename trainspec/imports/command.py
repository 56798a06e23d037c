"""trainspec import: prints the table and the recipe, or writes the recipe to a file."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from trainspec.errors import UserError
from trainspec.imports import import_configuration
from trainspec.imports.report import recipe_text, summary, table
from trainspec.imports.settings import Answers
from trainspec.recipe_file import apply_override


def run_import(args: Namespace) -> None:
    """Import the files of a command line. Raises UserError after the table where there is no recipe."""
    imported = import_configuration(args.files, answers(args), changes=args.changes, drops=args.drops)
    mark = "" if args.out else "# "  # without --out the whole output is the recipe
    tool, path = imported.configuration.tool, imported.configuration.path
    for line in (
        f"{path}: a configuration of {tool.name}; defaults are those of {tool.source}",
        *table(imported),
        summary(imported),
    ):
        print(f"{mark}{line}")
    imported.recipe()
    text = recipe_text(imported)
    if args.out is None:
        print(text, end="")
        return
    args.out.write_text(text, encoding="utf-8")
    print(f"wrote {args.out}; `trainspec show {args.out}` says what it means")


def answers(args: Namespace) -> Answers:
    """What the command line says besides the files. Raises UserError."""
    for name in ("devices", "examples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    tree: dict[str, Any] = {}
    for override in args.overrides:
        apply_override(tree, override)
    # Columns are a mapping and one setting.
    chosen = {
        f"{section}.{key}": value for section, keys in tree.items() for key, value in _settings(section, keys)
    }
    return Answers(args.devices, args.examples, chosen)


def _settings(section: str, keys: Any) -> list[tuple[str, Any]]:
    if not isinstance(keys, dict):
        raise UserError(
            f"--set {section}: is a section of a recipe; name a setting of it, such as --set run.steps=10"
        )
    return list(keys.items())
