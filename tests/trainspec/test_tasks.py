"""The metrics of the tasks, held to their libraries' own command lines on written files, and to cases done by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from trainspec.errors import DataError
from trainspec.tasks import LANGUAGES, TASKS, Answer, TaskName, overlap
from trainspec.tasks import task as room

PREDICTIONS = [
    "The cat is sitting on the mat.",
    "Return a list of the words in the string, split at blanks .",
    "",
    "...",
    "It doesn't close the file; the caller does (3.5 times).",
]
REFERENCES = [
    "The cat sat on the mat.",
    "Return a list of the words in the string.",
    "Close the file.",
    "Nothing happens!",
    "It does not close the file: the caller has to.",
]
CHINESE = ["北京是中国的首都，有两千万人。", "返回一个列表。", "", "……", "用 Python 3.11 写成的程序很快"]
CHINESE_REFERENCES = [
    "中国的首都是北京。",
    "返回由单词组成的列表。",
    "关闭文件。",
    "！",
    "程序是用 Python 3.11 写的",
]
CORPORA = {"en": (PREDICTIONS, REFERENCES), "zh": (CHINESE, CHINESE_REFERENCES)}


def answers(language: str) -> list[Answer]:
    predictions, references = CORPORA[language]
    return [Answer(p, (r,)) for p, r in zip(predictions, references, strict=True)]


def printed(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True)
    return done.stdout


def written(folder: Path, name: str, lines: list[str]) -> str:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", TASKS)
def test_what_an_answer_has_by_itself_is_of_a_mean(name: str, language):
    task, some = TASKS[name], answers(language)
    of_all = task.score(some, language=language)
    each = [task.score([answer], language=language) for answer in some]
    means = {
        key
        for key, value in of_all.items()
        if sum(one[key] for one in each) / len(each) == pytest.approx(value)
    }
    assert means == set(task.per_answer)  # and of what is a corpus's, as BLEU, it is not


def test_every_task_of_a_recipe_is_registered():
    assert {*TASKS, "conversation", "text"} == set(get_args(TaskName))
    for name, task in TASKS.items():
        assert task.name == name
        assert set(task.prompts) == set(LANGUAGES)
        for language in LANGUAGES:
            one = [Answer("a", ("b", "a"))]
            figures = task.score(one, language=language)
            assert set(task.describe(one, language=language)) == set(figures)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_is_what_sacrebleu_prints(tmp_path: Path, language: str):
    predictions, references = CORPORA[language]
    reference, hypothesis = written(tmp_path, "ref", references), written(tmp_path, "hyp", predictions)
    words = {"en": "13a", "zh": "zh"}[language]
    # fmt: off
    told = json.loads(printed(
        "sacrebleu", reference, "-i", hypothesis, "-m", "bleu", "chrf", "-tok", words, "-w", "10", "--format", "json",
    ))
    # fmt: on
    figures = TASKS["translation"].score(answers(language), language=language)
    assert figures == pytest.approx({"bleu": told[0]["score"], "chrf": told[1]["score"]}, abs=1e-9)
    assert 1 < figures["bleu"] < 99
    described = TASKS["translation"].describe(answers(language), language=language)
    assert described == {
        name: f"{one['name']}|{one['signature']}" for name, one in zip(figures, told, strict=True)
    }


def test_another_splitting_gives_other_figures():
    given = answers("zh")
    english, chinese = (TASKS["translation"].score(given, language=language) for language in LANGUAGES)
    assert english["bleu"] < chinese["bleu"]
    assert english["chrf"] == chinese["chrf"]


def test_translation_with_several_references_is_what_sacrebleu_prints(tmp_path: Path):
    others = ["A cat sits on a mat.", "Give the list of words.", "x", "y", "z"]
    given = [Answer(p, (r, o)) for p, r, o in zip(PREDICTIONS, REFERENCES, others, strict=True)]
    files = [written(tmp_path, "first", REFERENCES), written(tmp_path, "second", others)]
    hypothesis = written(tmp_path, "hyp", PREDICTIONS)
    told = json.loads(
        printed("sacrebleu", *files, "-i", hypothesis, "-m", "bleu", "chrf", "-w", "10", "--format", "json")
    )
    figures = TASKS["translation"].score(given, language="en")
    assert figures == pytest.approx({"bleu": told[0]["score"], "chrf": told[1]["score"]}, abs=1e-9)
    some = [Answer(PREDICTIONS[0], (REFERENCES[0], PREDICTIONS[0])), *answers("en")[1:]]
    assert TASKS["translation"].score(some, language="en")["bleu"] > figures["bleu"]
    assert "nrefs:var" in TASKS["translation"].describe(some, language="en")["bleu"]


def rouge_printed(folder: Path, predictions: list[str], references: list[str]) -> dict[str, float]:
    """The means of what rouge-score's program writes for every answer."""
    out = folder / "scores.csv"
    # fmt: off
    printed(
        "rouge_score.rouge", f"--target_filepattern={written(folder, 'targets', references)}",
        f"--prediction_filepattern={written(folder, 'predictions', predictions)}", f"--output_filename={out}",
        "--aggregate=false",
    )
    # fmt: on
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert len(rows) == len(predictions)
    return {
        name: 100 * sum(float(row[f"{name}-F"]) for row in rows) / len(rows)
        for name in ("rouge1", "rouge2", "rougeL")
    }


def test_summarisation_is_what_rouge_score_prints(tmp_path: Path):
    told = rouge_printed(tmp_path, PREDICTIONS, REFERENCES)
    figures = TASKS["summarisation"].score(answers("en"), language="en")
    assert figures == pytest.approx(told, abs=1e-4)
    assert 1 < figures["rouge2"] < figures["rougeL"] < figures["rouge1"] < 99


def test_chinese_summarisation_is_what_jieba_and_rouge_score_print(tmp_path: Path):
    """jieba's program splits; its words become Latin ones, as rouge-score's program knows no others."""
    known: dict[str, str] = {}

    def latin(lines: list[str], name: str) -> list[str]:
        split = printed("jieba", "-q", "-d", "\t", written(tmp_path, name, lines)).split("\n")
        words = [[word for word in line.split("\t") if word.strip()] for line in split]
        return [" ".join(known.setdefault(w, f"w{len(known)}") for w in some) for some in words][: len(lines)]

    told = rouge_printed(tmp_path, latin(CHINESE, "p"), latin(CHINESE_REFERENCES, "r"))
    figures = TASKS["summarisation"].score(answers("zh"), language="zh")
    assert figures == pytest.approx(told, abs=1e-4)
    assert 1 < figures["rouge2"] < figures["rougeL"] < 99
    assert TASKS["summarisation"].score(answers("zh"), language="en") != figures


def test_the_best_reference_counts():
    references = ("nothing alike", "The cat sat on the mat.")
    for name in ("summarisation", "reading_comprehension", "question_answering"):
        both = TASKS[name].score([Answer("the cat sat", references)], language="en")
        assert both == TASKS[name].score([Answer("the cat sat", references[1:])], language="en")
        assert both != TASKS[name].score([Answer("the cat sat", references[:1])], language="en")


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Cat!", "a cat", 1, 1),
        ("black cat", "the cat", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),
        ("at 3.5 times", "35 times", 0, 0.8),
        ("", "cat", 0, 0),
        ("cat", "", 0, 0),
        ("", "", 1, 1),
        ("...", "the!", 1, 1),
        ("theatre", "atre", 0, 0),
    ],
)
def test_english_agreement_by_hand(prediction: str, reference: str, exact: float, f1: float):
    assert overlap.english(prediction, reference) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("北京。", "北京", 1, 1),
        ("在北京", "北京", 0, 0.8),
        ("北东京", "北京", 0, 0.4),  # a run, not a bag: only one character in a row
        ("京北", "北京", 0, 0.5),
        ("用 Python 3.11", "Python 3.11", 0, 0.8),
        ("PYTHON", "python", 1, 1),
        ("Python程序", "Python", 0, 0.5),
        ("", "北京", 0, 0),
        ("。。", "！", 1, 0),
        ("北,京", "北京", 0, 0.4),  # an ASCII comma is a word
    ],
)
def test_chinese_agreement_by_hand(prediction: str, reference: str, exact: float, f1: float):
    assert overlap.chinese(prediction, reference) == pytest.approx((exact, f1))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_odd_corpora(name: str, language: str):
    with pytest.raises(DataError, match="no answer to measure"):
        TASKS[name].score([], language=language)
    with pytest.raises(DataError, match="answer 2 has no reference"):
        TASKS[name].score([Answer("a", ("a",)), Answer("a", ())], language=language)
    nothing = TASKS[name].score([Answer("", ("a b c d",)), Answer("...", ("x y z w",))], language=language)
    assert set(nothing.values()) == {0.0}
    right = "the right answer is here" if language == "en" else "正确的答案就在这里"
    figures = TASKS[name].score([Answer(right, (right,))], language=language)
    assert figures == pytest.approx(dict.fromkeys(figures, 100.0))


def test_a_library_that_is_not_installed_is_named():
    with pytest.raises(DataError, match=r"need the package sacrableu, .* pip install 'twintrain\[metrics\]'"):
        room.library("sacrableu.metrics")
