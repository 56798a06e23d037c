"""What a run reads: its examples, prompts to answer, how long it is, and what its contents are known by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainspec.checkpoints.identity import Identity, identity_of
from trainspec.data import Dataset, open_dataset
from trainspec.evaluation.heldout import Questions, questions_of
from trainspec.recipe import RunLength
from trainspec.runs.run import Run
from trainspec.text.store import find_tokenizer


@dataclass(frozen=True)
class RunData:
    """The datasets of a run (`heldout` if the recipe names one), its length, and its identity.

    `questions` are held-out records to answer during training, where the recipe asks for them.
    """

    train: Dataset
    heldout: Dataset | None
    span: RunLength
    identity: Identity
    questions: Questions | None = None


def open_data(run: Run) -> tuple[Run, RunData]:
    """Open the run's data. The run comes back with its length in updates, not in epochs. Raises DataError."""
    train = open_dataset(run, "train")
    heldout = open_dataset(run, "heldout") if run.recipe.data.heldout else None
    span = run.recipe.span(lambda: train.num_examples)
    data = RunData(train, heldout, span, identity_of(run, train), _questions(run))
    return replace(run, recipe=run.recipe.with_steps(span)), data


def _questions(run: Run) -> Questions | None:
    """The held-out records that `run.eval_generations` asks for."""
    data, count = run.recipe.data, run.recipe.run.eval_generations
    if not count:
        return None
    tokenizer = find_tokenizer(data, run.directory, run.recipe.model.from_)
    return questions_of(
        run, tokenizer, way_out="set run.eval_generations=0", examples=count, needs_references=False
    )
