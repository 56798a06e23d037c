"""What an evaluation has found: the untrained model beside the trained one, and every figure with how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
# Metrics that are means over the answers, so that one answer has a figure; those of a whole corpus are not among them.
PER_ANSWER = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Evaluation:
    """Of a run: `questions` where its task has metrics. `trained` is None where there is no checkpoint."""

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

    def figures(self, measurement: Measurement) -> dict[str, float]:
        """Every figure of one model by name; the task's and the accuracies are in percent."""
        found = {"heldout_loss": measurement.heldout_loss, "perplexity": measurement.perplexity}
        if task := task_of(self.run):
            found |= task.score(self.answers(measurement), language=self.language)
            found |= accuracies(self.asked, measurement.log_likelihoods)
        return found

    def signatures(self) -> dict[str, str]:
        """How every figure is computed."""
        found = dict(LOSS_SIGNATURES)
        if task := task_of(self.run):
            found |= task.describe(self.answers(self.untrained), language=self.language)
            found |= SIGNATURES if any(question.choices for question in self.asked) else {}
        return found

    def answers(self, measurement: Measurement) -> list[Answer]:
        """What a model has written, with what would have been right."""
        return [
            Answer(made.text, question.references)
            for question, made in zip(self.asked, measurement.generations, strict=True)
        ]

    def of_answer(self, answer: Answer) -> dict[str, float]:
        """The figures that one answer has by itself."""
        task = task_of(self.run)
        assert task is not None, "only tasks with metrics have answers"
        scores = task.score([answer], language=self.language)
        return {name: value for name, value in scores.items() if name in PER_ANSWER}


def task_of(run: Run) -> Task | None:
    """The run's task; None where answers are not measured, as with plain text."""
    return TASKS.get(run.recipe.data.task)
