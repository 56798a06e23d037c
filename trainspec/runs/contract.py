"""What the loop needs of a backend: the functions of its `step` module, and the metrics of an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from trainspec.runs.checkpoint import Checkpoint
from trainspec.data import Batch
from trainspec.runs.run import Run
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


class HasStep(Protocol):
    """A state of training."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        ...


S = TypeVar("S", bound=HasStep)


class Backend(Protocol[S]):
    """The functions of `jaxtrain.step` and `torchtrain.step`. Arrays are whole, under canonical names."""

    def init_state(self, run: Run, *, like: S | None = None) -> S:
        """The run before its first update. Reuses what was compiled for `like`, a state of an equal recipe."""
        ...

    def train_step(self, state: S, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[S, Metrics]:
        """One update; consumes `state`. Raises NonFiniteLossError before the update, with `state` as it was."""
        ...

    def eval_step(self, state: S, batch: Batch) -> tuple[float, int]:
        """Loss sum and target tokens, without dropout."""
        ...

    def weights_of(self, state: S, *, frozen: bool = False) -> Arrays:
        """The trained weights; with `frozen` all weights."""
        ...

    def moments_of(self, state: S) -> tuple[Arrays, Arrays]:
        """Adam's first and second moments."""
        ...

    def restore(self, state: S, checkpoint: Checkpoint) -> S:
        """`state` as it was when `checkpoint` was taken."""
        ...
