"""Translation, measured by sacreBLEU: corpus BLEU and chrF2, as its command line prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

from trainspec.tasks.task import Answer, Language, PromptForm, check_answers, library

# sacreBLEU's splitting of text into words: 13a for any language that is written with blanks.
WORDS: dict[Language, str] = {"en": "13a", "zh": "zh"}


class Translation:
    """A text in another language; the record's instruction says which."""

    name: ClassVar[str] = "translation"
    prompts: ClassVar[Mapping[Language, PromptForm]] = {
        "en": ("{instruction}", "{input}", "Translation:"),
        "zh": ("{instruction}", "{input}", "译文："),
    }
    per_answer: ClassVar[tuple[str, ...]] = ()

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """`bleu` and `chrf` of the whole corpus; records may have different numbers of references."""
        check_answers(answers)
        predictions, references = _streams(answers)
        return {
            name: metric.corpus_score(predictions, references).score
            for name, metric in _metrics(language).items()
        }

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """sacreBLEU's own signatures."""
        check_answers(answers)
        described = {}
        for name, metric in _metrics(language).items():
            score = metric.corpus_score(*_streams(answers))  # its signature has the number of references
            described[name] = f"{score.name}|{metric.get_signature()}"
        return described


def _metrics(language: Language) -> dict[str, Any]:
    sacrebleu = library("sacrebleu.metrics")
    # A period after a blank may well be the model's own: no warning that the text looks split into words.
    return {"bleu": sacrebleu.BLEU(tokenize=WORDS[language], force=True), "chrf": sacrebleu.CHRF()}


def _streams(answers: Sequence[Answer]) -> tuple[list[str], list[list[str | None]]]:
    """The predictions, and the references as sacreBLEU takes them: the first of each, the second of each, ..."""
    references = zip_longest(*(answer.references for answer in answers))
    return [answer.prediction for answer in answers], [list(stream) for stream in references]
