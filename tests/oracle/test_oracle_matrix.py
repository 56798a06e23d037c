"""Tokenizers x templates x conversations: our ids and our mask beside transformers' own.

`SUMMARY` is the result in one line, to be quoted: a test says that it is true.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from oracle import judge
from oracle.conversations import CONVERSATIONS
from oracle.judge import Judge, Refused, Verdict
from oracle.templates import TEMPLATES
from oracle.tokenizers import make_tokenizers
from trainspec.text.encode import Encoder, Unlocated
from trainspec.text.records import BadRecord

# Not the default of `data.date`, so that whoever forgets to pass it on is found.
DATE = datetime.date(2025, 3, 9)
TOKENIZERS = (
    "bytes_bos",
    "bytes_nobos",
    "bytes_llama3",
    "plain_bytes",
    "prepend",
    "plain_prepend",
    "metaspace_first",
    "metaspace_always",
    "unigram",
    "wordpiece",
    "wordpiece_plain",
    "in_tokenizer_json",
    "in_config",
    "in_added_tokens",
    "in_special_map",
    "strip",
    "flags_fast",
    "flags_llama",
    "cutting",
    "mistral_v1",
    "mistral_v3",
    "tekken",
)
UNLOCATED: dict[tuple[str, str, str], int] = {}
SUMMARY = ""


@dataclass
class Outcome:
    """Of one tokenizer: how many combinations went which way, and the first mismatches in words."""

    rendered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)
    unlocated: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    shifted: int = 0


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        judge.fix_clock(monkeypatch, DATE)
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def outcome(directories: dict[str, Path]) -> Callable[[str], Outcome]:
    return cache(lambda name: _compare(directories[name]))


def _compare(directory: Path) -> Outcome:
    outcome, transformers = Outcome(), Judge(directory)
    for template in TEMPLATES:
        encoder = Encoder(directory, chat_template=TEMPLATES[template], date=DATE)
        for name, record in CONVERSATIONS.items():
            messages, tools = record["messages"], record.get("tools")
            here = f"{directory.name} x {template} x {name}"
            try:
                expected = transformers.verdict(template, messages, tools)
            except Refused as refused:
                outcome.refused[str(refused)] += 1
                with pytest.raises(BadRecord):
                    encoder.encode_chat(messages, tools)
                continue
            outcome.rendered += 1
            if expected.gap:
                outcome.gaps[expected.gap] += 1
            elif expected.counts != expected.transformers:
                outcome.wrong.append(f"{here}: the judge: {_difference(expected, expected.transformers)}")
            try:
                got = encoder.encode_chat(messages, tools)
            except Unlocated as error:
                outcome.unlocated[template, name, str(error)] += 1
                continue
            if got.ids != expected.ids:
                outcome.wrong.append(f"{here}: ids: {got.ids} instead of {expected.ids}")
            elif got.counts != expected.counts:
                outcome.wrong.append(f"{here}: {_difference(expected, got.counts)}")
            if any(expected.counts):
                outcome.shifted += [False, *got.counts[:-1]] != expected.counts
    return outcome


def _difference(expected: Verdict, counts: list[bool]) -> str:
    """Where two masks first differ, by the text that the spans mark."""
    at = next(i for i, (a, b) in enumerate(zip(expected.counts, counts, strict=True)) if a != b)
    text, end = "", 0
    for start, stop in expected.spans:
        text += f"{expected.text[end:start]}⟦{expected.text[start:stop]}⟧"
        end = stop
    return f"token {at} is a target: {counts[at]} instead of {expected.counts[at]} in {text + expected.text[end:]!r}"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_mask_are_those_of_transformers(name: str, outcome: Callable[[str], Outcome]):
    wrong = outcome(name).wrong
    assert not wrong, f"{len(wrong)} of {outcome(name).rendered}, the first: {wrong[0]}"
    assert outcome(name).rendered > 100


def test_the_matrix_in_one_line(outcome: Callable[[str], Outcome], capsys: pytest.CaptureFixture[str]):
    outcomes = [outcome(name) for name in TOKENIZERS]
    refused, gaps, unlocated = Counter(), Counter(), Counter()
    for one in outcomes:
        refused += one.refused
        gaps += one.gaps
        unlocated += one.unlocated
    rendered = sum(one.rendered for one in outcomes)
    line = (
        f"{len(TOKENIZERS)} tokenizers x {len(TEMPLATES)} templates x {len(CONVERSATIONS)} conversations = "
        f"{len(TOKENIZERS) * len(TEMPLATES) * len(CONVERSATIONS)}: {refused.total()} refused by transformers ("
        + "; ".join(f"{n} {reason}" for reason, n in refused.most_common())
        + f"), {rendered} rendered, {rendered - unlocated.total()} with equal ids and mask, {unlocated.total()} not located"
    )
    with capsys.disabled():
        print(f"\n{line}")
        for title, counts in (("transformers' own mask has a gap", gaps), ("not located", unlocated)):
            for what, n in counts.most_common():
                print(f"  {title}: {n} {what}")
    assert unlocated == Counter(UNLOCATED)
    assert line == SUMMARY
