"""ChatGLM2's tokens: those of the sentencepiece package and of the published prompt, without code of the directory's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatglm2 import training_ids, write_sentencepiece
from sentencepiece import SentencePieceProcessor

from trainspec.data import Dataset, open_dataset
from trainspec.errors import DataError
from trainspec.runs.run import resolve
from trainspec.text.process import ask
from trainspec.text.store import Tokenizer

Open = Callable[..., Dataset]
# Blanks in front, inside and at the end; newlines; what is not in the vocabulary; words that look like special tokens.
TEXTS = (
    "北京在哪里？", " two  blanks in front ", "\n\n", "\tdef f(x):\n  return x + 1\n", "é 🙂 鱻", "[gMASK] sop <unk> </s> <s> eop", "sop",
    "[gMASK]", "{question} {0} 100%", "答：\n\n[Round 2]\n\n问：", "<0x0A>", "x\u3000y",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chatglm2")


@pytest.fixture(scope="module")
def pieces(home: Path) -> SentencePieceProcessor:
    return write_sentencepiece(home)


@pytest.fixture
def open_(
    make_recipe: Callable[..., Any], tmp_path: Path, home: Path, pieces: SentencePieceProcessor
) -> Open:
    """Opens records with the tokenizer of `home`; settings are fields of `data`."""

    def make(records: list[Any], **settings: Any) -> Dataset:
        file = tmp_path / "d.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        data = {"train": str(file), "tokenizer": str(home), "sequence_tokens": 400} | settings
        model = {"from": "preset:tiny", "weights": "random"}
        return open_dataset(resolve(make_recipe(model=model, data=data)), "train")

    return make


def asked(*texts: str) -> dict[str, Any]:
    """A conversation of questions and answers in turn."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def labelled(data: Dataset, number: int) -> tuple[list[int], list[int]]:
    ids, targets = data.record(number)
    return ids.tolist(), np.where(targets, ids, -100).tolist()


def test_ids_and_labels_are_those_of_the_published_training(open_: Open, pieces: SentencePieceProcessor):
    pairs = [(text, TEXTS[i - 5]) for i, text in enumerate(TEXTS)]
    data = open_([asked(*pair) for pair in pairs])
    for number, (question, answer) in enumerate(pairs):
        assert labelled(data, number) == training_ids(pieces, question, answer), (question, answer)
    # Control: question and answer in one text are other ids, as each begins with a blank of its own.
    ids, _ = labelled(data, 0)
    question, answer = pairs[0]
    whole = pieces.encode(f"[Round 1]\n\n问：{question}\n\n答：{answer}")
    assert ids[2:-1] != whole


def test_rounds_before_the_last_are_part_of_the_prompt(open_: Open, pieces: SentencePieceProcessor):
    rounds = [("你好", "你好！"), ("Hi", " <unk>\n"), ("x", "")]
    data = open_([asked(*(text for pair in rounds for text in pair), "And?", "在 北京")])
    assert labelled(data, 0) == training_ids(pieces, "And?", "在 北京", rounds)
    assert "1 of 1 records: has rounds before the last, which are part of the prompt" in data.summary


def test_an_instruction_is_a_round_where_the_task_is_conversation(
    open_: Open, pieces: SentencePieceProcessor
):
    records = [{"content": " 北京 ", "summary": "在中国\n"}, {"content": "a", "input": "b", "summary": "c"}]
    columns = {"instruction": "content", "output": "summary"}
    data = open_(records, task="conversation", columns=columns)
    assert labelled(data, 0) == training_ids(pieces, " 北京 ", "在中国\n")
    assert labelled(data, 1) == training_ids(pieces, "a\nb", "c")
    # Control: another task writes its own words.
    assert labelled(open_(records, columns=columns), 0) != labelled(data, 0)


def test_an_unknown_piece_in_the_answer_is_read_and_not_learnt(
    tmp_path: Path, open_: Open, pieces: SentencePieceProcessor
):
    """Without pieces for bytes a sign that was never seen is the unknown piece, which is padding's id."""
    other = write_sentencepiece(tmp_path / "unknown", byte_fallback=False)
    data = open_([asked("你好", "在🙂中国")], tokenizer=str(tmp_path / "unknown"))
    ids, labels = labelled(data, 0)
    assert (ids, labels) == training_ids(other, "你好", "在🙂中国")
    at = len(other.encode("[Round 1]\n\n问：你好\n\n答：")) + 2
    assert ids[at:].count(other.unk_id()) == 1
    assert labels[at:].count(-100) == 1
    assert "1 of 1 records: has characters that the tokenizer does not know" in data.summary


def test_plain_texts(open_: Open, pieces: SentencePieceProcessor):
    first = [len(pieces) + 1, len(pieces) + 3]
    data = open_([{"text": " 你好 \n"}], task="text")
    ids = [*first, *pieces.encode(" 你好 \n"), 2]
    assert labelled(data, 0) == (ids, [-100, -100, *ids[2:]])
    data = open_([{"prompt": "x ", "completion": " y"}])
    prompt, completion = pieces.encode("x "), pieces.encode(" y")
    assert labelled(data, 0)[0] == [*first, *prompt, *completion, 2]
    assert labelled(data, 0)[1] == [-100] * (2 + len(prompt)) + [*completion, 2]


def test_an_empty_answer_has_no_target(open_: Open):
    data = open_([asked("a", ""), asked("a", "b")])
    assert data.summary.count("1 without a target") == 1
    assert not data.record(0)[1].any()
    assert data.record(1)[1].any()


def test_special_tokens_are_never_made_of_text(open_: Open, pieces: SentencePieceProcessor):
    words = " ".join(("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<unk>", "<s>", "</s>"))
    data = open_([asked(words, words)])
    ids, _ = data.record(0)
    special = [i for i in ids.tolist() if i >= len(pieces) or i in (0, 1, 2)]
    assert special == [len(pieces) + 1, len(pieces) + 3, 2]
    [(shown, text)] = data.pieces([ids])
    assert shown[:2] == ["[gMASK]", "sop"]
    assert text == f"[gMASK]sop[Round 1]\n\n问：{words}\n\n答： {words}</s>"


def test_the_published_numbers():
    """64789 pieces, and the special tokens after them; the rows up to 65024 are no tokens."""
    from trainspec.text.chatglm import SPECIAL

    assert [64789 + SPECIAL.index(name) for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")] == [
        64789, 64790, 64791, 64792, 64793,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"messages": [{"role": "system", "content": "s"}, *asked("a", "b")["messages"]]}, "put it into the question"),
        (asked("a", "b", "c"), "does not end with an answer"),
        ({"messages": [*asked("a")["messages"], *asked("a", "b")["messages"]]}, "'user' in place of 'assistant'"),
        (asked("a", "b") | {"tools": [{"name": "f"}]}, "tools have no place .* data.ignore"),
        ({"messages": [*asked("a")["messages"], {"role": "assistant", "content": "b", "thinking": "t"}]}, "'thinking' of a message"),
    ],
)  # fmt: skip
def test_what_its_prompt_has_no_place_for_is_refused(record: dict[str, Any], line: str, open_: Open):
    with pytest.raises(DataError, match=f"line 2: .*{line}"):
        open_([asked("a", "b"), record])


def test_damaged_and_other_tokenizers_are_refused_in_one_line(
    tmp_path: Path, home: Path, pieces: SentencePieceProcessor, open_: Open
):
    def refused(change: Callable[[Path], object], **settings: Any) -> str:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(home, other)
        change(other)
        with pytest.raises(DataError) as error:
            open_([asked("a", "b")], tokenizer=str(other), **settings)
        return str(error.value)

    def cut(other: Path) -> None:
        file = other / "tokenizer.model"
        file.write_bytes(file.read_bytes()[:5000])

    assert "tokenizer.model: missing" in refused(lambda d: (d / "tokenizer.model").unlink())
    assert "no SentencePiece model" in refused(cut)
    assert "has no unknown, begin or end piece" in refused(lambda d: (d / "tokenizer.model").write_bytes(b""))
    assert "ChatGLM3's or a later" in refused(
        lambda d: (d / "tokenization_chatglm.py").write_text("x = '<|user|>'")
    )
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert "has a prompt of its own" in refused(lambda d: None, chat_template=str(tmp_path / "t.jinja"))


def test_no_code_of_the_directory_is_run(tmp_path: Path, home: Path, pieces: SentencePieceProcessor):
    other = tmp_path / "other"
    shutil.copytree(home, other)
    (other / "tokenization_chatglm.py").write_text("raise SystemExit('this was run')")
    tokenizer = Tokenizer(other, None, "2024-07-26")
    found = tokenizer.encode("你好", tmp_path / "cache")
    assert found == [len(pieces) + 1, len(pieces) + 3, *pieces.encode("你好")]
    assert ask(do="pieces", ids=[[424, 430]], **tokenizer._asked) == [[["eop", "<430>"], "eop<430>"]], len(
        pieces
    )
