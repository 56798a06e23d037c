"""What makes an update: an engine, the microbatches that a step gives it, and the store of what it trains.

Plain torch, DeepSpeed and DeepSpeed's pipeline are one to a step. They differ in the order in which they run the
microbatches' passes, and in what of the model and its training state a process has.
"""

# B examples, S sequence, T rows of a layer, N + S keys with those of N virtual tokens (`methods.virtual_tokens`), V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

# `input_ids` [B, S], `position_ids` [B, T] and `attention_mask` [B, 1, T, N + S] of a microbatch, in this process's rows.
Inputs = dict[str, Tensor]
Stored = Literal["weight", "gradient", "moment1", "moment2"]


class Microbatches(Protocol):
    """The microbatches of an update, in this process's rows. An engine says which one is in the model now.

    Forward passes are made in order, and backward passes too, but a pipeline makes forward passes of later
    microbatches before the backward pass of an earlier one.
    """

    def __len__(self) -> int:
        """How many they are."""
        ...

    def forward(self, index: int) -> Inputs:
        """The forward pass of microbatch `index` comes next: what it takes."""
        ...

    def loss(self, index: int, logits: Tensor) -> Tensor:
        """Its share of the batch's loss, from `logits` [B, T, V] of this process's part of the vocabulary."""
        ...

    def backward(self, index: int) -> None:
        """The backward pass of microbatch `index` comes next, in which its layers may be computed again."""
        ...


class Engine(Protocol):
    """What makes one update of a model.

    `loss_scale` is a factor that every loss is multiplied by, and no gradient in `store` has.
    """

    loss_scale: float
    store: Store

    def accumulate(self, microbatches: Microbatches) -> None:
        """Leave the batch's gradients in `store`: the sum over the microbatches and the replicas."""
        ...

    def infer(self, parts: Sequence[Inputs]) -> list[Tensor]:
        """Logits [B, T, V] of each part; none where the process is not of the pipeline's last stage."""
        ...

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        ...

    def close(self) -> None:
        """Leave nothing behind in the process."""
        ...


class Store(Protocol):
    """Where weights, gradients and moments are, and how they are read whole; parts over `tensor` stay parts."""

    def norm(self) -> float:
        """The norm of all gradients, before clipping."""
        ...

    def read(self, what: Stored, parameter: nn.Parameter) -> Tensor:
        """One tensor, whole over the replicas: all of them have to ask."""
        ...

    def write(self, what: Stored, parameter: nn.Parameter, value: Tensor) -> None:
        """Its reverse; a master copy gets `value` as it is, the copy that is computed with rounds it."""
        ...

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of the training state in this process."""
        ...
