"""What an answer and a reference have in common: exact match and F1, by the definitions of two published evaluations.

English is SQuAD's, of version 2.0, which also says what an empty answer is (https://rajpurkar.github.io/SQuAD-explorer): lower case,
without punctuation and articles; F1 of the words that both have. Chinese is CMRC 2018's (https://github.com/ymcui/cmrc2018): lower case,
without punctuation; F1 of the longest run that both have, of Chinese characters and of the words between them. These words are
nltk's, of the whole run at once: splitting it into sentences first, as there, would need a file that nltk downloads.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import ClassVar, NamedTuple

from trainspec.tasks.task import Answer, Language, check_answers, installed, library, mean_percent

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_CHARACTER = re.compile("[\u4e00-\u9fa5]")
# What CMRC 2018 removes before it compares. It keeps other punctuation, such as an ASCII comma.
_CHINESE_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")


class Overlap(NamedTuple):
    """Shares of an answer or a whole corpus."""

    exact_match: float
    f1: float


class OverlapMetrics:
    """The metrics of a task whose answers are compared in this way."""

    per_answer: ClassVar[tuple[str, ...]] = ("exact_match", "f1")

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """`exact_match` and `f1`: means over the answers, of each the best over its references."""
        check_answers(answers)
        compare = chinese if language == "zh" else english
        each = [
            [compare(answer.prediction, reference) for reference in answer.references] for answer in answers
        ]
        return {
            "exact_match": mean_percent(max(best.exact_match for best in some) for some in each),
            "f1": mean_percent(max(best.f1 for best in some) for some in each),
        }

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """Whose definitions they are."""
        whose = f"CMRC 2018, words of {installed('nltk')}" if language == "zh" else "SQuAD 2.0"
        return dict.fromkeys(self.per_answer, whose)


def english(prediction: str, reference: str) -> Overlap:
    """SQuAD's figures of one answer. Of two texts without a word both are 1, of one without both are 0."""
    mine, theirs = _english_words(prediction), _english_words(reference)
    if not mine or not theirs:
        return Overlap(float(mine == theirs), float(mine == theirs))
    return Overlap(float(mine == theirs), _f1((Counter(mine) & Counter(theirs)).total(), mine, theirs))


def chinese(prediction: str, reference: str) -> Overlap:
    """CMRC 2018's figures of one answer. Two texts without a word are an exact match, with an F1 of 0."""
    is_exact = _without_punctuation(prediction) == _without_punctuation(reference)
    mine, theirs = _chinese_words(prediction), _chinese_words(reference)
    longest = SequenceMatcher(None, mine, theirs, autojunk=False).find_longest_match()
    return Overlap(float(is_exact), _f1(longest.size, mine, theirs))


def _f1(common: int, mine: Sequence[str], theirs: Sequence[str]) -> float:
    if not common:
        return 0.0
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return _ARTICLES.sub(" ", kept).split()


def _without_punctuation(text: str) -> str:
    return "".join(c for c in text.lower().strip() if c not in _CHINESE_PUNCTUATION)


def _chinese_words(text: str) -> list[str]:
    """Each Chinese character, and the words of what is between them."""
    nltk = library("nltk.tokenize")
    words: list[str] = []
    for part in re.split(f"({_CHARACTER.pattern})", _without_punctuation(text)):
        is_character = _CHARACTER.fullmatch(part)
        words += [part] if is_character else nltk.word_tokenize(part, preserve_line=True)
    return words
