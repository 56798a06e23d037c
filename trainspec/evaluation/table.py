"""The table of an evaluation on the console."""

from __future__ import annotations

from collections.abc import Iterator

from trainspec.evaluation.evaluation import Evaluation
from trainspec.evaluation.heldout import Questions
from trainspec.tasks import TASKS


def table(evaluation: Evaluation) -> Iterator[str]:
    """The lines: what was asked and how, a row for every figure, and whose the columns are."""
    if evaluation.questions:
        yield _answered(evaluation, evaluation.questions)
        if note := evaluation.questions.note():
            yield note
    elif (data := evaluation.run.recipe.data).task in TASKS:
        yield (
            f"{data.heldout}: neither an instruction nor a prompt with a completion as texts, which data.task={data.task} is "
            "measured on; the loss alone is measured"
        )
    models, signatures = evaluation.models, evaluation.signatures
    columns = [evaluation.figures[name] for name in models]
    rows = [["", *models, ""]]
    for name, how in signatures.items():
        decimals = 4 if name == "heldout_loss" else 2
        rows.append([name, *(f"{column[name]:,.{decimals}f}" for column in columns), how])
    if evaluation.questions:
        asked = len(evaluation.asked)
        ended = [f"{measurement.ended} of {asked}" for measurement in models.values()]
        rows.append(["ended", *ended, "answers that ended by themselves"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *values, how in rows:
        aligned = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:-1], strict=True))
        yield f"{name.ljust(widths[0])}  {aligned}  {how}".rstrip()
    yield "; ".join(f"{name}: {measurement.whose}" for name, measurement in models.items())


def _answered(evaluation: Evaluation, questions: Questions) -> str:
    """What was asked, and how it was answered."""
    data, settings = evaluation.run.recipe.data, evaluation.request.settings
    sampling = settings.sampling
    how = "greedy" if sampling.is_greedy else f"temperature {sampling.temperature:g}, seed {sampling.seed}"
    asked, some = len(questions.asked), ""
    if questions.first < questions.records:
        some = f" of {questions.records}, the first ones (--examples {evaluation.request.examples})"
    return (
        f"{data.task}: {asked} prompt{'s' * (asked != 1)} of {data.heldout}{some}, answered {how} in at most "
        f"{settings.max_tokens} tokens"
    )
