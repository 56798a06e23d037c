"""What an evaluation has found: the untrained model beside the trained one, and every figure with how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from trainspec.data import Dataset
from trainspec.evaluation.choices import SIGNATURES, accuracies
from trainspec.evaluation.heldout import Question, Questions
from trainspec.evaluation.measurement import Measurement
from trainspec.evaluation.request import EvaluationRequest
from trainspec.plans.accelerators import Devices
from trainspec.runs.run import Run
from trainspec.tasks import TASKS, Answer, Language, Task

# How figures that every run has are computed.
LOSS_SIGNATURES = {
    "heldout_loss": "mean cross-entropy per target token of all held-out examples",
    "perplexity": "e to its power",
}


@dataclass(frozen=True)
class Evaluation:
    """Of a run: `questions` where its answers are measured. `trained` is None where the starting weights alone are measured."""

    run: Run
    request: EvaluationRequest
    devices: Devices
    heldout: Dataset
    questions: Questions | None
    untrained: Measurement
    trained: Measurement | None

    @property
    def models(self) -> dict[str, Measurement]:
        """What was measured, by the name of its column."""
        columns = {"untrained": self.untrained}
        return columns | {"trained": self.trained} if self.trained else columns

    @property
    def asked(self) -> Sequence[Question]:
        """The held-out records that were answered."""
        return self.questions.asked if self.questions else ()

    @property
    def language(self) -> Language:
        """That of the answers."""
        return self.run.recipe.data.language

    @property
    def task(self) -> Task | None:
        """The task that answers are measured by."""
        return task_of(self.run, self.heldout)

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """Every figure by name, of each of `models`; the task's and the accuracies are in percent."""
        return {name: self._figures(measurement) for name, measurement in self.models.items()}

    def _figures(self, measurement: Measurement) -> dict[str, float]:
        found = {"heldout_loss": measurement.heldout_loss, "perplexity": measurement.perplexity}
        if self.task:
            found |= self.task.score(self.answers(measurement), language=self.language)
            found |= accuracies(self.asked, measurement.log_likelihoods)
        return found

    @cached_property
    def signatures(self) -> dict[str, str]:
        """How every figure is computed."""
        found = dict(LOSS_SIGNATURES)
        if self.task:
            found |= self.task.describe(self.answers(self.untrained), language=self.language)
            found |= SIGNATURES if any(question.choices for question in self.asked) else {}
        return found

    def answers(self, measurement: Measurement) -> list[Answer]:
        """What a model has written, with what would have been right."""
        return [
            Answer(made.text, question.references)
            for question, made in zip(self.asked, measurement.generations, strict=True)
        ]

    def of_answer(self, answer: Answer) -> dict[str, float]:
        """The figures that one answer has by itself; a task whose metrics are all of a corpus has none."""
        assert self.task is not None, "only tasks with metrics have answers"
        if not self.task.per_answer:
            return {}
        scores = self.task.score([answer], language=self.language)
        return {name: scores[name] for name in self.task.per_answer}


def task_of(run: Run, heldout: Dataset) -> Task | None:
    """The task that held-out answers are measured by; None where no record has one as text, as with conversations and plain text."""
    return TASKS.get(run.recipe.data.task) if heldout.has_answers else None
