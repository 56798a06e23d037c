"""Summarisation, measured by rouge-score: the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, in percent.

English words are rouge-score's own: lower case, letters and digits, without stemming. Chinese words are jieba's, as in ChatGLM2's
published evaluation, where `jieba.cut` splits answer and reference; punctuation counts there, and here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from trainspec.tasks.task import Answer, Language, PromptForm, check_answers, installed, library, mean_percent

METRICS = ("rouge1", "rouge2", "rougeL")


class Summarisation:
    """What a text says, in short."""

    name: ClassVar[str] = "summarisation"
    prompts: ClassVar[Mapping[Language, PromptForm]] = {
        "en": ("{instruction}", "{input}", "Summary:"),
        "zh": ("{instruction}", "{input}", "摘要："),
    }
    per_answer: ClassVar[tuple[str, ...]] = METRICS

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """`rouge1`, `rouge2` and `rougeL`: means over the answers, of each the best over its references."""
        check_answers(answers)
        scorer = library("rouge_score.rouge_scorer").RougeScorer(METRICS, tokenizer=_words(language))
        scores = [scorer.score_multi(answer.references, answer.prediction) for answer in answers]
        return {name: mean_percent(score[name].fmeasure for score in scores) for name in METRICS}

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """The libraries and their settings."""
        words = installed("jieba") if language == "zh" else "its own words, no stemming"
        return dict.fromkeys(METRICS, f"{installed('rouge-score')}, F-measure, {words}")


def _words(language: Language) -> Any:
    if language == "zh":
        return _Jieba()
    return library("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=False)


class _Jieba:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in _cutter().cut(text) if word.strip()]


@lru_cache(maxsize=1)
def _cutter() -> Any:
    """jieba with its own dictionary. Its cache is not used: any user of the machine may have written that."""
    jieba = library("jieba")
    jieba.setLogLevel("ERROR")
    cutter = jieba.Tokenizer()
    with TemporaryDirectory() as folder:
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter
