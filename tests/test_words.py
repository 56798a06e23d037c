"""Words that the glossary has retired stay out of code, comments and messages."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs/glossary.md"
# Of each retired word the pattern that finds it, and phrases in which it means something else.
RETIRED = {
    "behind (of time or order)": r"(?<!nothing )(?<!process )(?<!left )(?<![-_])\bbehind\b(?![-_])",
    "a person (who uses the program)": r"\b(?:a|the) person\b",
    "going on (from a checkpoint)": r"\bgoing on (?:behind|from|after)\b",
}
# Of each retired name the package that it stays out of, and the pattern of identifiers; a class has that word before it.
RETIRED_NAMES = {
    "place (of a comparison)": ("parity", r"places?|(class )?Place"),
    "a participle as the name of a class (`Ran`, `Ended`, `Held`)": (
        "parity",
        r"class _?(?:[A-Z]\w*ed|Ran|Held|Kept|Found|Left|Made|Seen|Done)",
    ),
    "contrast (two arrays of one location)": ("parity", r"contrasts?|class Contrast"),
    "handed on (of a difference)": ("parity", r"handed"),
}
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
    *(
        path
        for folder in (
            "trainspec",
            "jaxtrain",
            "torchtrain",
            "parity",
            "scripts",
            "benchmarks",
            "docs",
            "configs",
        )
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md", ".yaml") and path != GLOSSARY
    ),
]


def found(pattern: str, text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.search(pattern, line, re.I)]


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_stays_out(word: str):
    uses = {str(p.relative_to(ROOT)): found(RETIRED[word], p.read_text(encoding="utf-8")) for p in WRITTEN}
    assert not {path: lines for path, lines in uses.items() if lines}


def names(source: str) -> Iterator[str]:
    """The identifiers of a module; the name of a class comes with that word."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield f"class {token.string}" if before == "class" else token.string
            before = token.string


@pytest.mark.parametrize("word", RETIRED_NAMES)
def test_a_retired_name_stays_out(word: str):
    package, pattern = RETIRED_NAMES[word]
    uses = {
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in names(path.read_text(encoding="utf-8"))
        if re.fullmatch(pattern, name)
    }
    assert not uses


@pytest.mark.parametrize("word", [*RETIRED, *RETIRED_NAMES])
def test_the_glossary_says_what_to_write_instead(word: str):
    assert f"| {word} | " in GLOSSARY.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("behind (of time or order)", "# behind the gradient everything is known"),
        ("a person (who uses the program)", '"""What a person sees."""'),
        ("going on (from a checkpoint)", 'f"going on behind step {step}"'),
    ],
)
def test_a_retired_word_is_seen(word: str, line: str):
    assert found(RETIRED[word], line)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("place (of a comparison)", "finding.place.step"),
        ("a participle as the name of a class (`Ran`, `Ended`, `Held`)", "class _Filled(Visitor): ..."),
        ("a participle as the name of a class (`Ran`, `Ended`, `Held`)", "class Ran: ..."),
        ("contrast (two arrays of one location)", "bounds.contrasts(location, left, right)"),
        ("handed on (of a difference)", "own + handed"),
    ],
)
def test_a_retired_name_is_seen(word: str, line: str):
    assert any(re.fullmatch(RETIRED_NAMES[word][1], name) for name in names(line))
