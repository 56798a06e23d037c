"""What the loops of training, evaluation and generation ask of a backend: the functions of its `step` module.

The other modules that a backend has are in `trainspec.contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trainspec.checkpoints.states import S, States
from trainspec.data import Batch
from trainspec.trace import Keep

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Metrics:
    """The results of one update. `grad_norm`, `gradients` and `activation_gradients` are taken before clipping.

    `gradients` (by canonical name), `activations` and `activation_gradients` (by point, [global_examples,
    sequence_tokens, ...]) are given only on request. A gradient is that of the batch's mean token loss.
    """

    loss_sum: float
    tokens: int
    grad_norm: float
    gradients: Arrays | None = None
    activations: Arrays | None = None
    activation_gradients: Arrays | None = None


RoundingKind = Literal["stored", "wide"]
# The root mean square of a rounding to nearest, in units of the largest: an error uniform in half a last place, whose
# relative size is 1 / m at mantissa m, over mantissas of log-uniform numbers: √(1/3 · (1 - 1/4) / (2 ln 2)).
RMS_ROUNDING = 0.4247


@dataclass(frozen=True)
class Roundings:
    """Root mean squares of the roundings that a float64 reference simulates, as shares of what is rounded.

    `stored` is that of results in the type that is computed with, `wide` of those in the accumulation type, `summed` of weights'
    gradients in the type that they are summed in.
    """

    stored: float
    wide: float
    summed: float

    def of(self, kind: RoundingKind) -> float:
        """The size of a rounding of this kind."""
        return self.stored if kind == "stored" else self.wide


class Decoding(Protocol):
    """Rows of tokens that grow by one at a time: what attention needs of the tokens that are there is kept.

    The logits are those of `Backend.next_logits` for the whole rows, but for rounding. All processes call, with the same
    arguments.
    """

    def begin(self, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row of `batch`, which has one segment a row, padded right."""
        ...

    def extend(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """Add a token [B] to each row: the logits [B, vocab] after it. -1 adds none to a row that has ended: its logits mean nothing."""
        ...


class Backend(States[S], Protocol[S]):
    """The functions of `jaxtrain.step` and `torchtrain.step`. Arrays are whole, under canonical names."""

    def feed(self, state: S, batch: Batch) -> Batch:
        """The same batch, near the devices: called in a thread while `train_step` makes another update of the run."""
        ...

    def train_step(self, state: S, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[S, Metrics]:
        """One update; consumes `state`.

        Raises NonFiniteLossError with the step's metrics before the update, with `state` as it was.
        """
        ...

    def eval_step(self, state: S, batch: Batch) -> tuple[float, int]:
        """Loss sum and target tokens, without dropout."""
        ...

    def next_logits(self, state: S, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row, without dropout; on every process."""
        ...

    def decoding(self, state: S, *, length: int) -> Decoding | None:
        """A cache for rows of up to `length` tokens; None where the plan has none, and each token computes its whole row."""
        ...

    def weights_of(self, state: S, *, frozen: bool = False) -> Arrays:
        """The trained weights; with `frozen` all weights."""
        ...

    def moments_of(self, state: S) -> tuple[Arrays, Arrays]:
        """Adam's first and second moments."""
        ...


class Reference(Backend[S], Protocol):
    """A backend that can be the float64 reference of `parity`: it simulates the roundings of a narrower type."""

    def gradients_of(
        self, state: S, batch: Batch, *, keep: Keep, roundings: Roundings | None = None, draw: int = 0
    ) -> Metrics:
        """What an update would leave, without making it. Raises NonFiniteLossError with it, if it is not finite."""
        ...

    def logits(
        self, state: S, batch: Batch, *, roundings: Roundings | None = None, draw: int = 0
    ) -> NDArray[Any]:
        """The logits [B, S, vocab] after every token of `batch`, without dropout."""
        ...
