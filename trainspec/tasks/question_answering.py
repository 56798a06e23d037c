"""Question answering: a question on its own. Exact match and F1, as SQuAD and CMRC 2018 define them.

Of records with choices the share that is right is no matter of text: whoever has the model compares their probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from trainspec.tasks import agreement
from trainspec.tasks.task import Answer, Language, Prompt


class QuestionAnswering:
    """A question, and what it is about where the record has an input."""

    name: ClassVar[str] = "question_answering"
    prompts: ClassVar[Mapping[Language, Prompt]] = {
        "en": ("Question: {instruction}", "{input}", "Answer:"),
        "zh": ("问题：{instruction}", "{input}", "答案："),
    }

    def score(self, answers: Sequence[Answer], *, language: Language) -> dict[str, float]:
        """`exact_match` and `f1`: means over the answers, of each the best over its references."""
        return agreement.score(answers, language)

    def describe(self, answers: Sequence[Answer], *, language: Language) -> dict[str, str]:
        """Whose definitions they are."""
        return agreement.describe(language)
