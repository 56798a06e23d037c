"""Tokenizers x templates x conversations: our ids and our mask beside transformers' own.

`SUMMARY` is the result in one line, to be quoted: a test says that it is true.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from oracle import judge
from oracle.conversations import CONVERSATIONS, RAW, Record
from oracle.judge import Judge, Refused, Verdict
from oracle.random_chats import random_records
from oracle.templates import ODD_TAGGED, TAGGED, TEMPLATES, without_tags
from oracle.tokenizers import PLAIN, make_tokenizers
from trainspec.text.encode import Encoder, Unlocated
from trainspec.text.fields import BadRecord
from trainspec.text.records import Chat, Reader

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
# Of a template and a conversation, by reason: for how many tokenizers what counts cannot be located.
UNLOCATED: dict[str, int] = {}
SUMMARY = (
    "22 tokenizers x 15 templates x 33 conversations = 10890: 1404 refused by transformers (645 the template needs "
    "`content`, and beside the calls there is none; 607 the template refuses (raise_exception); 152 the template adds a "
    "begin or end token that the tokenizer does not name), 9486 rendered, 9486 with equal ids and mask, 0 not located"
)


@dataclass
class Outcome:
    """Of one tokenizer: how many combinations went which way, and the first mismatches in words."""

    rendered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)
    unlocated: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module", autouse=True)
def clock_and_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        judge.fix_clock(monkeypatch, DATE)
        # Loading Mistral's takes longer than all that is done with them. The judge's tokenizer and the encoder's are
        # two, since they are asked for in different ways.
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", cache(AutoTokenizer.from_pretrained))
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def outcome(directories: dict[str, Path]) -> Callable[[str], Outcome]:
    return cache(lambda name: _compare(directories[name]))


def _compare(
    directory: Path, records: Mapping[str, Record] = CONVERSATIONS, templates: Mapping[str, str] = TAGGED
) -> Outcome:
    outcome, transformers = Outcome(), Judge(directory)
    for template, tagged in templates.items():
        # A template that has tags of its own keeps them.
        encoder = Encoder(directory, chat_template=without_tags(tagged), date=DATE)
        for name, record in records.items():
            messages, tools = record["messages"], record.get("tools")
            here = f"{directory.name} x {template} x {name}"
            try:
                expected = transformers.verdict(tagged, messages, tools)
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
                outcome.unlocated[f"{template} x {name}: {error}"] += 1
                continue
            outcome.wrong += [f"{here}: {what}" for what in _mismatch(expected, got.ids, got.counts)]
            outcome.wrong += [f"{here}: {what}" for what in _cut(expected, got.turns)]
    return outcome


def _mismatch(expected: Verdict, ids: list[int], counts: list[bool]) -> list[str]:
    if ids != expected.ids:
        return [f"ids: {ids} instead of {expected.ids}"]
    return [_difference(expected, counts)] if counts != expected.counts else []


def _cut(expected: Verdict, turns: list[int]) -> list[str]:
    """Where a turn is said to begin and does not: within what the assistant says, or at no token behind the first."""
    if sorted({*turns} & {*range(1, len(expected.ids))}) != turns:
        return [f"turns at {turns} of {len(expected.ids)} tokens"]
    # A blank that a turn begins with may be in no token: inside is behind another token of the same turn.
    starts = expected.starts
    inside = [t for t in turns if any(a <= starts[t - 1] and starts[t] < b for a, b in expected.spans)]
    return [f"turns at {inside} are in the middle of what the assistant says"] if inside else []


def _difference(expected: Verdict, counts: list[bool]) -> str:
    """Where two masks first differ, by the text that the spans mark."""
    at = next(i for i, (a, b) in enumerate(zip(expected.counts, counts, strict=True)) if a != b)
    text, end = "", 0
    for start, stop in expected.spans:
        text += f"{expected.text[end:start]}⟦{expected.text[start:stop]}⟧"
        end = stop
    return f"token {at} is a target: {counts[at]} instead of {expected.counts[at]} in {text + expected.text[end:]!r}"


# One of each kind; `make test-full` has them all.
FAST = ("bytes_bos", "prepend", "metaspace_always", "wordpiece", "strip", "tekken")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in TOKENIZERS]
)
def test_ids_and_mask_are_those_of_transformers(name: str, outcome: Callable[[str], Outcome]):
    wrong = outcome(name).wrong
    assert not wrong, f"{len(wrong)} of {outcome(name).rendered}, the first: {wrong[0]}"
    assert outcome(name).rendered > 100


@pytest.mark.full
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


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_twin_renders_what_its_template_does(template: str):
    def render(source: str, record: Record) -> str:
        try:
            [text], _ = render_jinja_template(
                conversations=[record["messages"]],
                tools=record.get("tools"),
                chat_template=source,
                bos_token="<s>",
                eos_token="</s>",
            )
        except jinja2.TemplateError as error:
            return f"refused: {error}"
        return text

    texts = {name: render(TEMPLATES[template], record) for name, record in CONVERSATIONS.items()}
    assert texts == {name: render(TAGGED[template], record) for name, record in CONVERSATIONS.items()}
    assert sum(not text.startswith("refused: ") for text in texts.values()) >= 13
    assert "endgeneration" in TAGGED[template]
    assert ("endgeneration" in TEMPLATES[template]) == (template == "generation")


def test_at_least_two_tokenizers_have_the_marks_as_plain_text(directories: dict[str, Path]):
    for name in TOKENIZERS:
        tokenizer = Judge(directories[name]).tokenizer
        pieces = [tokenizer.tokenize(mark) for mark in ("<|im_start|>", "<|eot_id|>", "<start_of_turn>")]
        assert all(len(piece) > 1 for piece in pieces) == (name in PLAIN), name
    assert len(PLAIN) >= 2


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_records_in_openais_shape_become_the_canonical_ones(name: str):
    # A template that names the role `developer`, or it would become `system`.
    template = TEMPLATES["chatml"] + "{# 'developer' #}"
    read = Reader("question_answering").read(RAW[name], lambda tools: template)
    assert isinstance(read, Chat)
    assert read.messages == CONVERSATIONS[name]["messages"]
    assert read.tools == CONVERSATIONS[name].get("tools")
    assert read.learnt == [message["role"] == "assistant" for message in read.messages]


RANDOM = {f"number {i}": record for i, record in enumerate(random_records(40, seed=14))}
MORE_RANDOM = {f"number {i}": record for i, record in enumerate(random_records(1000, seed=41))}


@pytest.mark.parametrize("name", ["bytes_bos", pytest.param("plain_prepend", marks=pytest.mark.full)])
def test_random_conversations(name: str, directories: dict[str, Path]):
    outcome = _compare(directories[name], RANDOM)
    assert not outcome.wrong, f"{len(outcome.wrong)} of {outcome.rendered}, the first: {outcome.wrong[0]}"
    assert outcome.unlocated.total() <= outcome.rendered / 100


@pytest.mark.full
@pytest.mark.parametrize("name", ["bytes_bos", "plain_bytes", "metaspace_always", "strip", "wordpiece"])
def test_many_random_conversations(name: str, directories: dict[str, Path]):
    outcome = _compare(directories[name], MORE_RANDOM)
    assert not outcome.wrong, f"{len(outcome.wrong)} of {outcome.rendered}, the first: {outcome.wrong[0]}"
    assert outcome.unlocated.total() <= outcome.rendered / 100


@pytest.mark.parametrize("name", ["bytes_bos", pytest.param("plain_prepend", marks=pytest.mark.full)])
def test_odd_templates_are_masked_right_or_not_at_all(name: str, directories: dict[str, Path]):
    outcome = _compare(directories[name], CONVERSATIONS, ODD_TAGGED)
    assert not outcome.wrong, f"{len(outcome.wrong)} of {outcome.rendered}, the first: {outcome.wrong[0]}"
    # Of the one that writes everything twice, all.
    assert 0 < outcome.unlocated.total() <= outcome.rendered * 0.6


# ---------------------------------------------------------------- what must fail


def test_a_mask_that_is_off_by_one_token_is_seen(directories: dict[str, Path]):
    transformers = Judge(directories["bytes_bos"])
    for name, record in CONVERSATIONS.items():
        expected = transformers.verdict(TAGGED["qwen3"], record["messages"], record.get("tools"))
        shifted = [False, *expected.counts[:-1]]
        assert _mismatch(expected, expected.ids, shifted), name
        assert not _mismatch(expected, expected.ids, expected.counts)


def test_the_end_token_left_out_or_the_prompt_put_in_is_seen(directories: dict[str, Path]):
    transformers = Judge(directories["bytes_bos"])
    expected = transformers.verdict(TAGGED["chatml"], CONVERSATIONS["many_turns"]["messages"], None)
    end = transformers.tokenizer.convert_tokens_to_ids("<|im_end|>")
    without = [flag and i != end for i, flag in zip(expected.ids, expected.counts, strict=True)]
    assert _mismatch(expected, expected.ids, without)
    assert _mismatch(expected, expected.ids, [True] * len(expected.ids))


@pytest.mark.parametrize("name", ["prepend", "metaspace_always", "plain_prepend"])
def test_stretches_encoded_by_themselves_are_other_ids(name: str, directories: dict[str, Path]):
    transformers = Judge(directories[name])
    wrong = 0
    for record in CONVERSATIONS.values():
        expected = transformers.verdict(TAGGED["qwen3"], record["messages"], record.get("tools"))
        borders = sorted({0, len(expected.text), *(at for span in expected.spans for at in span)})
        stretches = [expected.text[start:end] for start, end in pairwise(borders)]
        ids = [i for s in stretches for i in transformers.tokenizer(s, add_special_tokens=False).input_ids]
        wrong += bool(_mismatch(expected, ids, expected.counts))
    assert wrong > len(CONVERSATIONS) / 2


def test_special_tokens_put_around_a_chat_are_other_ids(directories: dict[str, Path]):
    transformers = Judge(directories["bytes_bos"])
    expected = transformers.verdict(TAGGED["gemma"], CONVERSATIONS["one_turn"]["messages"], None)
    ids = transformers.tokenizer(expected.text).input_ids
    assert _mismatch(expected, ids, expected.counts)


@pytest.mark.parametrize("template", ["llama3", "qwen3", "mistral", "r1", "glm4"])
def test_jinjas_own_tojson_is_another_text(template: str, directories: dict[str, Path]):
    transformers = Judge(directories["bytes_bos"])
    record = CONVERSATIONS["tool_markup"]
    expected = transformers.verdict(TAGGED[template], record["messages"], record["tools"])
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = DATE.strftime
    source = TEMPLATES[template].replace("(indent=4)", "")
    text = environment.from_string(source).render(
        messages=record["messages"], tools=record["tools"], bos_token="<s>", eos_token="</s>"
    )
    ids = transformers.tokenizer(text, add_special_tokens=False).input_ids
    assert "\\u003cb\\u003e" in text
    assert "\\u003cb\\u003e" not in expected.text
    assert _mismatch(expected, ids, expected.counts)


def test_another_date_is_other_ids(directories: dict[str, Path]):
    messages = CONVERSATIONS["one_turn"]["messages"]
    expected = Judge(directories["bytes_bos"]).verdict(TAGGED["llama3"], messages, None)
    ours = Encoder(directories["bytes_bos"], chat_template=TEMPLATES["llama3"]).encode_chat(messages, None)
    assert "09 Mar 2025" in expected.text
    assert _mismatch(expected, ours.ids, ours.counts)
