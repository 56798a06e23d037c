"""Make the data of the four tasks in configs/data: of Python's docstrings, and of names that CLDR has in two languages.

    python scripts/make_task_data.py [OUT]

Every file is sorted and holds no randomness: the same Python and the same Babel give the same bytes. What is held out is
decided by a hash, of a function's name as in `make_demo_data.py`, or of an English name or its number. configs/data/README.md
says what each file holds.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import babel
from babel import Locale, dates, lists, numbers, units
from make_demo_data import (
    CALL_CHARACTERS,
    HELD_OUT_ONE_IN,
    Entry,
    choose,
    json_line,
    qa_record,
    read_entries,
    write,
)

T = TypeVar("T")
TRANSLATE = "把下面的英文翻译成中文。"
SUMMARISE = (
    "Summarise this documentation in one sentence.",
    "Say in one sentence what this describes.",
    "Give the first line of this documentation.",
)
ENGLISH, CHINESE = Locale("en"), Locale("zh", script="Hans")
# Bounds with which the files stay small and records fit the recipes' rows.
BODY_CHARACTERS = range(120, 360)
ANSWER_CHARACTERS = range(1, 70)
NUMBERS = (2, 3, 5, 8, 12, 25, 40, 100, 365, 1000)
UNITS = (
    "area-acre", "area-hectare", "area-square-kilometer", "area-square-meter", "concentr-percent", "consumption-liter-per-kilometer",
    "digital-byte", "digital-gigabyte", "digital-kilobyte", "digital-megabyte", "duration-century", "duration-day", "duration-hour",
    "duration-minute", "duration-month", "duration-second", "duration-week", "duration-year", "electric-ampere", "electric-volt",
    "energy-calorie", "energy-joule", "energy-kilowatt-hour", "frequency-hertz", "frequency-megahertz", "length-centimeter",
    "length-foot", "length-inch", "length-kilometer", "length-light-year", "length-meter", "length-mile", "length-millimeter",
    "length-nautical-mile", "length-yard", "mass-gram", "mass-kilogram", "mass-ounce", "mass-pound", "mass-tonne", "power-kilowatt",
    "power-watt", "pressure-millimeter-ofhg", "speed-kilometer-per-hour", "speed-meter-per-second", "speed-mile-per-hour",
    "temperature-celsius", "temperature-fahrenheit", "volume-cubic-meter", "volume-cup", "volume-gallon", "volume-liter",
    "volume-milliliter", "volume-tablespoon", "volume-teaspoon",
)  # fmt: skip
Span = Literal["second", "minute", "hour", "day", "week", "year"]
SECONDS: dict[Span, int] = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86400,
    "week": 604_800,
    "year": 31_536_000,
}
FIRST_DAY, DAYS = date(2020, 1, 1), 2000


@dataclass(frozen=True)
class Pair:
    """A text in two languages, and what it is made of, which decides whether it is held out."""

    kind: str
    key: str
    english: str
    chinese: str

    def hashed(self, salt: str) -> int:
        """A stable pseudo-random number of the pair; each use has its own `salt`."""
        return _hashed(f"{salt}:{self.kind}:{self.key}")


def main(out: Path) -> None:
    """Write every data file and the licence of CLDR's names into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    entries, pairs = read_entries(), list(read_pairs())
    for split, is_held_out, counts in (("train", False, (1200, 240, 480)), ("heldout", True, (120, 40, 60))):
        translations, summaries, questions = counts
        part = [entry for entry in entries if entry.held_out == is_held_out]
        files = {
            "translation": _picked(
                [p for p in pairs if _held_out(p.key) == is_held_out],
                translations, lambda p: p.hashed("pick"), translation_record,
            ),
            "summarisation": _picked(
                [e for e in part if len(_body(e)) in BODY_CHARACTERS],
                summaries, lambda e: e.hashed("summary"), summarisation_record,
            ),
            "reading": _picked(
                [r for e in part for r in reading_records(e)], questions, lambda r: _hashed(str(r)), lambda r: r
            ),
        }  # fmt: skip
        for name, records in files.items():
            write(out / f"{name}-{split}.jsonl", map(json_line, records))
    asked = choose([e for e in entries if e.held_out], 120, salt="qa")
    write(out / "choices-heldout.jsonl", (json_line(choice_record(entry, asked)) for entry in asked))
    licence = Path(babel.__file__).parent / "locale-data/LICENSE.unicode"
    write(out / "LICENSE-UNICODE.txt", [licence.read_text(encoding="utf-8")])


def _picked(
    found: list[T], count: int, order: Callable[[T], int], record: Callable[[T], dict[str, Any]]
) -> Iterable[dict[str, Any]]:
    """The records of `count` of what was found, picked by hash, in the order in which they were found."""
    if len(found) < count:
        raise SystemExit(f"{len(found)} records found, {count} wanted; widen the bounds")
    chosen = set(sorted(range(len(found)), key=lambda i: (order(found[i]), i))[:count])
    return (record(one) for i, one in enumerate(found) if i in chosen)


def translation_record(pair: Pair) -> dict[str, Any]:
    """An instruction in Chinese, a text in English, and the same in Chinese."""
    return {"instruction": TRANSLATE, "input": pair.english, "output": pair.chinese}


def summarisation_record(entry: Entry) -> dict[str, Any]:
    """A call with its docstring without its first sentence, which is the answer."""
    instruction = SUMMARISE[entry.hashed("summarise") % len(SUMMARISE)]
    return {"instruction": instruction, "input": f"{entry.call}\n{_body(entry)}", "output": entry.sentence}


def reading_records(entry: Entry) -> Iterator[dict[str, Any]]:
    """Questions about a call and its docstring whose answers stand in them, as SQuAD's do; no more than two."""
    text = f"{entry.call}: {_words(entry)}"
    if len(entry.call) not in CALL_CHARACTERS or len(text) > BODY_CHARACTERS.stop:
        return
    asked = sorted(_questions(entry, text), key=lambda question: entry.hashed(question[0]))
    for question, answers in asked[:2]:
        found = [a for a in dict.fromkeys(answers) if len(a) in ANSWER_CHARACTERS and a in text]
        if found:
            yield {"instruction": question, "input": text, "references": found}


def _questions(entry: Entry, text: str) -> Iterator[tuple[str, list[str]]]:
    module, _, _ = entry.name.rpartition(".")
    if module and module[0].islower():
        yield f"Where is {entry.name.rpartition('.')[2]} defined?", [module]
    for name, default in re.findall(r"[(,] ?(\w+)=([\w.'\"-]+)(?=[,)])", entry.call):
        yield f"What is the default of {name}?", [default, f"{name}={default}"]
    if first := re.search(r"\((\w+)", entry.call):
        yield "Which parameter comes first?", [first[1]]
    if made := re.search(r"\bReturns? (?:an? |the )?([a-z][^.,:;()]+)", text):
        yield "What does it return?", [made[0].partition(" ")[2], made[1]]
    if error := re.search(r"\b(\w+Error)\b", text):
        yield "Which error is mentioned?", [error[1]]
    if condition := re.search(r"\b([Ii]f [a-z][^.,:;()]+)", text):
        yield "Under which condition?", [condition[1], condition[1].partition(" ")[2]]


def choice_record(entry: Entry, others: list[Entry]) -> dict[str, Any]:
    """A question with its answer among those of three other names, at a location that the name decides."""
    wrong = sorted(
        (e for e in others if e.name != entry.name), key=lambda e: _hashed(f"{entry.name}:{e.name}")
    )
    choices = [e.sentence for e in wrong[:3]]
    choices.insert(entry.hashed("choice") % 4, entry.sentence)
    return qa_record(entry) | {"choices": choices}


def read_pairs() -> Iterator[Pair]:
    """Every pair, sorted; of those with the same English text only the first."""
    found: dict[str, Pair] = {}
    for pair in sorted(
        (*_names(), *_counted(), *_dated(), *_listed()), key=lambda p: (p.kind, p.key, p.english)
    ):
        if pair.english != pair.chinese:
            found.setdefault(pair.english, pair)
    yield from found.values()


def _names() -> Iterator[Pair]:
    """What CLDR calls territories, languages, scripts, currencies, units, months and days."""
    for kind in ("territories", "languages", "scripts", "currencies"):
        mine, theirs = getattr(ENGLISH, kind), getattr(CHINESE, kind)
        for code in sorted(mine.keys() & theirs.keys()):
            yield Pair(kind, mine[code], mine[code], theirs[code])


def _counted() -> Iterator[Pair]:
    """Amounts: of a unit, of a currency, of time before and after now."""
    for unit in UNITS:
        for number in NUMBERS:
            mine, theirs = (units.format_unit(number, unit, locale=locale) for locale in (ENGLISH, CHINESE))
            yield Pair("unit", f"{number} {unit}", mine, theirs)
    for code in (
        "AUD",
        "BRL",
        "CHF",
        "CNY",
        "EUR",
        "GBP",
        "INR",
        "JPY",
        "KRW",
        "MXN",
        "RUB",
        "SEK",
        "USD",
        "ZAR",
    ):
        for number in NUMBERS:
            mine, theirs = (
                numbers.format_currency(
                    number, code, locale=locale, format_type="name", currency_digits=False
                )
                for locale in (ENGLISH, CHINESE)
            )
            yield Pair("amount", f"{number} {code}", mine, theirs)
    for unit, seconds in SECONDS.items():
        for number in (2, 3, 4, 5, 6):
            for sign in (-1, 1):
                span = timedelta(seconds=sign * number * seconds)
                mine, theirs = (
                    dates.format_timedelta(
                        span, add_direction=True, threshold=1, granularity=unit, locale=locale
                    )
                    for locale in (ENGLISH, CHINESE)
                )
                yield Pair("span", f"{sign * number} {unit}", mine, theirs)


def _dated() -> Iterator[Pair]:
    """Some days, written out."""
    for number in range(0, DAYS, 5):
        day = FIRST_DAY + timedelta(days=number)
        for style in ("full", "long"):
            mine, theirs = (dates.format_date(day, style, locale=locale) for locale in (ENGLISH, CHINESE))
            yield Pair("date", f"{day}", mine, theirs)


def _listed() -> Iterator[Pair]:
    """Two or three territories in a row: all held out, or none."""
    codes = sorted(c for c in ENGLISH.territories.keys() & CHINESE.territories.keys() if c.isalpha())
    for is_held_out in (False, True):
        kept = [c for c in codes if _held_out(ENGLISH.territories[c]) == is_held_out]
        kept.sort(key=lambda code: _hashed(f"list:{code}"))
        for size in (2, 3):
            for at in range(len(kept) - size):
                mine, theirs = (
                    lists.format_list([locale.territories[c] for c in kept[at : at + size]], locale=locale)
                    for locale in (ENGLISH, CHINESE)
                )
                if _held_out(mine) == is_held_out:
                    yield Pair("list", mine, mine, theirs)


def _held_out(key: str) -> bool:
    return _hashed(f"split:{key}") % HELD_OUT_ONE_IN == 0


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _words(entry: Entry) -> str:
    """The docstring on one line."""
    return " ".join(entry.document.partition("\n")[2].split())


def _body(entry: Entry) -> str:
    """The docstring on one line without its first sentence; empty where it does not begin with it."""
    words = _words(entry)
    return words.removeprefix(entry.sentence).strip() if words.startswith(entry.sentence) else ""


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "configs/data"))
