"""Which of the answers that a record offers a model takes: the most probable one after the prompt.

Each answer's probability is that of its tokens after the prompt's, from the loss of a row of its own: `eval_step` is right under
every plan. A row is computed by itself, as the loss is a sum over the batch: what else a plan needs of rows is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainspec.evaluation.heldout import Choice, Question
from trainspec.generation.rows import batch_of, room
from trainspec.runs.run import Run
from trainspec.step import Backend, S

# How each figure is computed, as lm-eval's `acc` and `acc_norm` are.
SIGNATURES = {
    "accuracy": "the choice of the largest log-likelihood, as lm-eval's acc",
    "accuracy_normalised": "the same divided by the choice's number of characters, as lm-eval's acc_norm",
}


def log_likelihood(backend: Backend[S], state: S, run: Run, choice: Choice) -> float:
    """The logarithm of the probability of a choice's tokens, given those before."""
    plan = run.recipe.plan
    batch, _ = batch_of([choice.ids], limit=room(run), count=plan.replicas * plan.microbatches)
    labels = batch.labels.copy()
    labels[0, choice.first : len(choice.ids)] = choice.ids[choice.first :]
    loss_sum, _ = backend.eval_step(state, replace(batch, labels=labels))
    return -loss_sum


def chosen(question: Question, log_likelihoods: Sequence[float], *, normalised: bool) -> int:
    """The index of the choice that the model takes; of equal ones the first."""
    lengths = [len(choice.text) if normalised else 1 for choice in question.choices]
    return int(np.argmax(np.array(log_likelihoods) / np.array(lengths)))


def accuracies(questions: Sequence[Question], log_likelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
    """The figures of SIGNATURES in percent, over the records that offer choices; empty where none does."""
    judged = [are_right(q, found) for q, found in zip(questions, log_likelihoods, strict=True) if q.choices]
    if not judged:
        return {}
    return {name: 100 * sum(each[name] for each in judged) / len(judged) for name in SIGNATURES}


def are_right(question: Question, log_likelihoods: Sequence[float]) -> dict[str, bool]:
    """Of each of SIGNATURES whether the choice that the model takes is one of the right answers."""
    taken = {
        name: question.choices[chosen(question, log_likelihoods, normalised=normalised)]
        for name, normalised in zip(SIGNATURES, (False, True), strict=True)
    }
    return {name: choice.text in question.references for name, choice in taken.items()}
