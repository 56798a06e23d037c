"""Words that the glossary has retired stay out of code, comments and messages."""

from __future__ import annotations

import re
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
WRITTEN = [
    path
    for folder in ("trainspec", "jaxtrain", "torchtrain", "parity", "scripts", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    # What the registry of faults says stands word for word in its page.
    if path.suffix in (".py", ".md") and "faults" not in str(path) and path != GLOSSARY
]


def found(pattern: str, text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.search(pattern, line, re.I)]


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_stays_out(word: str):
    uses = {str(p.relative_to(ROOT)): found(RETIRED[word], p.read_text(encoding="utf-8")) for p in WRITTEN}
    assert not {path: lines for path, lines in uses.items() if lines}


@pytest.mark.parametrize("word", RETIRED)
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
