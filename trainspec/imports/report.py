"""What is printed of an import: a table of every setting, and the recipe with the origin of each of its lines."""

from __future__ import annotations

from typing import Any, assert_never

import yaml

from trainspec.imports import Imported, describe_refusal, nested
from trainspec.imports.settings import NoEffect, Question, Refused, Translated, format_theirs
from trainspec.imports.tool import Line

HEAD = ("setting", "value", "verdict", "here")


def table(imported: Imported) -> list[str]:
    """A line for every setting, given or by default: its value, the verdict, and our settings or the reason."""
    rows = [HEAD, *(row(line) for line in imported.lines)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)), cells[3]])
        for cells in rows
    ]


def row(line: Line) -> tuple[str, str, str, str]:
    """The four cells of a setting."""
    return line.name, format_theirs(line.value), verdict(line), here(line)


def verdict(line: Line) -> str:
    """What became of it, in one or two words."""
    match line.outcome:
        case Translated():
            return {"given": "translated", "default": "by default", "replaced": "replaced"}[line.origin]
        case NoEffect():
            return "no effect"
        case Refused():
            return "refused"
        case Question():
            return "asked for"
        case other:
            assert_never(other)


def here(line: Line) -> str:
    """Our settings, or why there are none."""
    match line.outcome:
        case Translated(ours, note):
            said = ", ".join(f"{key}={scalar(value)}" for key, value in ours.items())
            text = "; ".join(part for part in (said, note) if part) or "as here"
        case NoEffect(reason):
            text = reason
        case Refused():
            text = describe_refusal(line)
        case Question(answer, reason):
            text = f"{answer}: {reason}"
        case other:
            assert_never(other)
    return f"{text}{_in_brackets(line.source)}" if isinstance(line.outcome, Translated) else text


def _in_brackets(source: str) -> str:
    return f" ({source})" if source else ""


def summary(imported: Imported) -> str:
    """How many settings had each verdict, and what differs."""
    counts: dict[str, int] = {}
    for line in imported.lines:
        counts[verdict(line)] = counts.get(verdict(line), 0) + 1
    names = [line.name for line in imported.differences()]
    each = ", ".join(f"{count} {name}" for name, count in counts.items())
    differing = f"; what differs: {', '.join(names)}" if names else ""
    return f"{len(imported.lines)} settings: {each}{differing}"


def recipe_text(imported: Imported) -> str:
    """The recipe as YAML. Each line names the setting that it comes from, and where a default stands."""
    origins: dict[str, str] = {}
    for line in imported.lines:
        if isinstance(line.outcome, Translated):
            origin = (
                line.name if line.origin == "given" else f"{line.name}, by default{_in_brackets(line.source)}"
            )
            origins |= {key: origin for key in line.outcome.ours if key not in origins}
    origins |= dict.fromkeys(imported.chosen, "--set")
    text = [
        f"# From a configuration of {imported.configuration.tool.name}: {imported.configuration.path.name}"
    ]
    for section, settings in nested(imported.ours).items():
        text.append(f"{section}:")
        for name, value in settings.items():
            text.append(f"  {name}: {scalar(value)}  # {origins[f'{section}.{name}']}")
    return "\n".join(text) + "\n"


def scalar(value: Any) -> str:
    """A value as YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
