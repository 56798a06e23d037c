"""What a backend is to the loop: the functions of its `step` module, and what one update leaves."""

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
    """What one update leaves. `grad_norm`, `gradients` and the activations' gradients are taken before clipping.

    `gradients` (by canonical name), `activations` and `activation_gradients` (by point, [global_examples,
    sequence_tokens, ...]) are there where they were asked for. A gradient is that of the batch's mean token loss.
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
        """How many updates were made."""
        ...


S = TypeVar("S", bound=HasStep)


class Backend(Protocol[S]):
    """The functions of `jaxtrain.step` and `torchtrain.step`. Names of arrays are canonical, arrays are whole."""

    def init_state(self, run: Run, *, like: S | None = None) -> S:
        """The run before its first update. What was compiled for `like`, of an equal recipe, is used again."""
        ...

    def train_step(self, state: S, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[S, Metrics]:
        """One update; consumes `state`. Raises NonFiniteLossError before the update, with `state` as it was."""
        ...

    def eval_step(self, state: S, batch: Batch) -> tuple[float, int]:
        """Loss sum and target tokens, without dropout."""
        ...

    def weights_of(self, state: S, *, frozen: bool = False) -> Arrays:
        """Trained weights; with `frozen` all of them."""
        ...

    def moments_of(self, state: S) -> tuple[Arrays, Arrays]:
        """Adam's first and second moments."""
        ...

    def restore(self, state: S, checkpoint: Checkpoint) -> S:
        """`state` as it was when `checkpoint` was taken."""
        ...
