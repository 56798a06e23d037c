"""Reading comprehension: the answer to a question is in a text. Exact match and F1, as SQuAD and CMRC 2018 define them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from trainspec.tasks.overlap import OverlapMetrics
from trainspec.tasks.task import Language, PromptForm


class ReadingComprehension(OverlapMetrics):
    """A question about a text, which is the record's input."""

    name: ClassVar[str] = "reading_comprehension"
    prompts: ClassVar[Mapping[Language, PromptForm]] = {
        "en": ("{input}", "Question: {instruction}", "Answer:"),
        "zh": ("{input}", "问题：{instruction}", "答案："),
    }
