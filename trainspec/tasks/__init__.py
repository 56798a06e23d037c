"""The tasks of instruction records: what a record is asked as, and how answers are measured. One file per task.

A task's name is what `data.task` says. Metrics come from libraries that are imported when a figure is asked for.
"""

from __future__ import annotations

from typing import Literal

from trainspec.tasks.question_answering import QuestionAnswering
from trainspec.tasks.reading_comprehension import ReadingComprehension
from trainspec.tasks.summarisation import Summarisation
from trainspec.tasks.task import LANGUAGES, Answer, Language, PromptForm, Task, write_prompt
from trainspec.tasks.translation import Translation

__all__ = ["LANGUAGES", "TASKS", "Answer", "Language", "PromptForm", "Task", "TaskName", "write_prompt"]

# The registry: the tasks that have prompts and metrics.
TASKS: dict[str, Task] = {
    task.name: task for task in (QuestionAnswering(), Summarisation(), Translation(), ReadingComprehension())
}
# What `data.task` may say: one of these, or how records are written without a task.
TaskName = Literal[
    "question_answering", "summarisation", "translation", "reading_comprehension", "conversation", "text"
]
