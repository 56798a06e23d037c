"""The held-out loss: a sum over every held-out example and a count, divided once."""

from __future__ import annotations

from collections.abc import Sequence

from trainspec.data import Dataset
from trainspec.runs.run import Run
from trainspec.step import Backend, S


def heldout_examples(run: Run) -> int:
    """Examples per evaluation batch: an accumulation slice, which training has in memory as well."""
    return run.recipe.batch.global_examples // run.recipe.batch.accumulation


def heldout_loss(backend: Backend[S], state: S, heldout: Dataset, examples: int) -> float:
    """Mean cross-entropy per target token over every held-out example, `examples` at a time."""
    return mean_loss([backend.eval_step(state, batch) for batch in heldout.in_order(examples)])


def mean_loss(sums: Sequence[tuple[float, int]]) -> float:
    """The mean of the losses whose sums and counts these are."""
    return sum(loss_sum for loss_sum, _ in sums) / sum(tokens for _, tokens in sums)
