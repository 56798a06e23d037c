"""Question answering: a question on its own. Exact match and F1, as SQuAD and CMRC 2018 define them.

Of records with choices the share that is right is no matter of text: whoever has the model compares their probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from trainspec.tasks.overlap import OverlapMetrics
from trainspec.tasks.task import Language, PromptForm


class QuestionAnswering(OverlapMetrics):
    """A question, and what it is about where the record has an input."""

    name: ClassVar[str] = "question_answering"
    prompts: ClassVar[Mapping[Language, PromptForm]] = {
        "en": ("Question: {instruction}", "{input}", "Answer:"),
        "zh": ("问题：{instruction}", "{input}", "答案："),
    }
