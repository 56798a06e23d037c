"""What a run reads: its examples, how long it is, and what its contents are known by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainspec.data import Dataset, open_dataset
from trainspec.recipe import RunLength
from trainspec.runs.identity import Identity, identity_of
from trainspec.runs.run import Run


@dataclass(frozen=True)
class RunData:
    """The datasets of a run (`heldout` if the recipe names one), its length, and its identity."""

    train: Dataset
    heldout: Dataset | None
    span: RunLength
    identity: Identity


def open_data(run: Run) -> tuple[Run, RunData]:
    """Open the run's data. The run comes back with its length in updates, not in epochs. Raises DataError."""
    train = open_dataset(run, "train")
    heldout = open_dataset(run, "heldout") if run.recipe.data.heldout else None
    span = run.recipe.span(lambda: train.num_examples)
    data = RunData(train, heldout, span, identity_of(run, train))
    return replace(run, recipe=run.recipe.with_steps(span)), data
