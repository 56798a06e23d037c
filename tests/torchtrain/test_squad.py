"""Exact match and F1 in English, held to torchmetrics' reading of SQuAD's script."""

from __future__ import annotations

import random

import pytest
from torchmetrics.functional.text import squad

from trainspec.tasks import TASKS, Answer

WORDS = ("the", "a", "An", "cat", "Cat's", "dog,", "3.5", "-", "...", "theatre", "é", "北京", "don't", "")


def drawn(rng: random.Random) -> str:
    return rng.choice((" ", "  ", "\n")).join(rng.choices(WORDS, k=rng.randrange(5)))


@pytest.mark.parametrize("name", ["reading_comprehension", "question_answering"])
def test_figures_are_those_of_torchmetrics(name: str):
    rng = random.Random(name)
    answers = [Answer(drawn(rng), tuple(drawn(rng) for _ in range(rng.randrange(1, 4)))) for _ in range(300)]
    answers += [Answer("", ("",)), Answer("", ("cat",)), Answer("cat", ("",)), Answer("...", ("the",))]
    told = squad(
        [{"id": str(i), "prediction_text": answer.prediction} for i, answer in enumerate(answers)],
        [
            {"id": str(i), "answers": {"answer_start": [0] * len(a.references), "text": list(a.references)}}
            for i, a in enumerate(answers)
        ],
    )
    figures = TASKS[name].score(answers, language="en")
    # Its sums are float32.
    assert figures == pytest.approx({k: float(v) for k, v in told.items()}, rel=1e-5)
    assert 10 < figures["exact_match"] < figures["f1"] < 90
    assert TASKS[name].score(answers, language="zh") != pytest.approx(figures, rel=1e-2)
