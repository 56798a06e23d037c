"""An engine makes updates: it runs the microbatches that a step gives it, and keeps what it trains in a store.

Plain torch, DeepSpeed and DeepSpeed's pipeline are alike to a step. They differ in the order in which they run the
microbatches' passes, and in which shards of the model and its training state a process holds.
"""

# B examples, S sequence, T positions of a layer (`methods.virtual_tokens`), V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor, nn

from torchtrain.attention.cache import Cache, OneToken
from torchtrain.attention.visible import Visible
from torchtrain.optim import MOMENTS
from torchtrain.weights import Elements

# The head's output is logits [B, T, V] of this process's shard of the vocabulary, or a loss sum (`loss_chunks.HeadLoss`).
Saved = Literal["weight", "moment1", "moment2"]
Stored = Literal[Saved, "gradient"]


class Inputs(TypedDict):
    """`input_ids` [B, S] and `position_ids` [B, T] of this process's examples of a microbatch, and what each may see.

    A `cache` keeps the keys and values of a pass over rows, and a pass over one more token of each reads and adds to it.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Visible | OneToken
    cache: NotRequired[Cache]


class Microbatches(Protocol):
    """This process's examples of an update's microbatches. An engine says which of them is in the model now.

    Forward passes are made in order, and backward passes too, but a pipeline makes forward passes of later
    microbatches before the backward pass of an earlier one.
    """

    def __len__(self) -> int:
        """Number of microbatches."""
        ...

    def forward(self, index: int) -> Inputs:
        """What the forward pass of microbatch `index` takes, which comes next."""
        ...

    def loss(self, index: int, output: Tensor) -> Tensor:
        """Its share of the batch's loss, from the head's output."""
        ...

    def backward(self, index: int) -> None:
        """The backward pass of microbatch `index` comes next, in which its layers may be recomputed."""
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

    def infer(self, count: int, inputs: Callable[[int], Inputs]) -> list[Tensor]:
        """The head's output of each of `count` microbatches, whose `inputs` are asked for before its pass.

        None where the process is not of the pipeline's last stage.
        """
        ...

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        ...

    def close(self) -> None:
        """Leave nothing of the engine in the process."""
        ...


class Stretch(NamedTuple):
    """Consecutive elements of a flattened tensor, those from `first` on, as a view of the training state."""

    first: int
    elements: Tensor


class Store(Protocol):
    """Where weights, gradients and moments are. They are read whole over the replicas, but as shards over `tensor`."""

    def norm(self) -> float:
        """The norm of all gradients, before clipping."""
        ...

    def read(self, kind: Stored, parameter: nn.Parameter) -> Tensor:
        """One tensor of `parameter`'s. All replicas have to call."""
        ...

    def own(self, kind: Saved, parameter: nn.Parameter) -> Stretch:
        """What this replica saves of one tensor: all replicas together have each element once. Nothing is sent."""
        ...

    def write(self, kind: Saved, parameter: nn.Parameter, elements: Elements) -> None:
        """Read the elements that this replica holds into one tensor of `parameter`'s.

        A master weight gets them as they are, the weight that is computed with rounds them.
        """
        ...

    def tensors(self) -> dict[str, list[Tensor]]:
        """The training state in this process: `weights`, `gradients`, `master` weights and `moments`."""
        ...


def by_kind(
    weights: Iterable[Tensor],
    gradients: Iterable[Tensor],
    master: Iterable[Tensor],
    optimizer: torch.optim.AdamW,
) -> dict[str, list[Tensor]]:
    """What a store's `tensors` gives."""
    moments = [state[key] for state in optimizer.state.values() for key in MOMENTS.values()]
    return {
        "weights": list(weights),
        "gradients": list(gradients),
        "master": list(master),
        "moments": moments,
    }
