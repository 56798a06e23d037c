"""Reading comprehension: the answer to a question is in a text. Exact match and F1, as SQuAD and CMRC 2018 define them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from trainspec.tasks import agreement
from trainspec.tasks.task import Answer, Language, Prompt


class ReadingComprehension:
    """A question about a text, which is the record's input."""

    name: ClassVar[str] = "reading_comprehension"
    prompts: ClassVar[Mapping[Language, Prompt]] = {
        "en": ("{input}", "Question: {instruction}", "Answer:"),
        "zh": ("{input}", "问题：{instruction}", "答案："),
    }

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """`exact_match` and `f1`: means over the answers, of each the best over its references."""
        return agreement.score(answers, language)

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """Whose definitions they are."""
        return agreement.describe(language)
