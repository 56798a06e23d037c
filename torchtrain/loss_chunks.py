"""The loss of rows in chunks of their positions, `plan.loss_chunk`: logits exist for one chunk at a time.

A chunk's gradients are made beside its loss, in the forward pass, and summed over the chunks: the gradient of a sum, which the
backward pass only multiplies by a number. So nothing of a chunk is kept or made twice, and a head whose weights are sharded is
gathered once for all chunks (docs/decisions/0026). Differs from jaxtrain, where a function of the model decides: here the head
of Hugging Face's model is what has the hidden states, and it gives the loss sum in place of logits.
"""

# B examples, T positions of a layer, N positions of a chunk, E embed, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.dropout import DropoutPoint, Stretch
from torchtrain.families import anatomy_of
from torchtrain.loss import target_loss, targets_of
from torchtrain.mesh import Peers
from torchtrain.precision import accumulation_dtype


@dataclass(frozen=True)
class Expected:
    """The loss that a forward pass shall give: of these targets [B, T], by `chunk` positions of each row at a time.

    `divisor` is what the caller divides the loss by. Gradients are made of the quotient, so that they are rounded as there.
    """

    targets_BT: Tensor
    divisor: int
    chunk: int


class HeadLoss:
    """The head of a model, which makes the loss sum in place of logits where one is expected of the next forward pass."""

    def __init__(self, model: PreTrainedModel, *, point: DropoutPoint, tensor: Peers) -> None:
        """Takes the place of the head's own `forward`: hooks of the module and the names of its weights stay."""
        self._head = anatomy_of(model).head(model)
        self._own_forward = self._head.forward
        self._point, self._tensor = point, tensor
        self._expected: Expected | None = None
        self._positions_B: Tensor | None = None
        self._head.forward = self._forward

    def expect(self, labels_BT: Tensor, *, divisor: int, chunk: int) -> None:
        """Have the next forward pass give the loss sum of these labels."""
        self._expected = Expected(targets_of(labels_BT), divisor, chunk)

    def expect_logits(self, positions_B: Tensor) -> None:
        """Have the next forward pass give the logits [B, 1, V] at one position of each row."""
        self._positions_B = positions_B

    def _forward(self, hidden_BTE: Tensor) -> Tensor:
        positions_B, self._positions_B = self._positions_B, None
        if positions_B is not None:
            rows = torch.arange(len(positions_B), device=hidden_BTE.device)
            return self._own_forward(hidden_BTE[rows, positions_B][:, None])
        expected, self._expected = self._expected, None
        if expected is None:
            return self._own_forward(hidden_BTE)
        # In the function gradients are off, and `needs_input_grad` does not say whether they were off before.
        trained = [p for p in self._head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        return _ChunkedLoss.apply(hidden_BTE, self, expected, *trained)  # pyright: ignore[reportReturnType]

    def chunk_loss(self, hidden_BNE: Tensor, targets_BN: Tensor, *, first: int, positions: int) -> Tensor:
        """The loss sum of a chunk whose first position is `first` of `positions`."""
        self._point.stretch = Stretch(first, positions)
        try:
            return target_loss(self._own_forward(hidden_BNE), targets_BN, tensor=self._tensor)[0]
        finally:
            self._point.stretch = None


class _ChunkedLoss(torch.autograd.Function):
    """Loss sum of a head over hidden states [B, T, E], and its gradients by these and by the head's weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTE: Tensor, head: HeadLoss, expected: Expected, *trained: nn.Parameter
    ) -> Tensor:
        hidden_wanted, _, _, *_ = ctx.needs_input_grad
        wanted, positions = any(ctx.needs_input_grad), hidden_BTE.shape[1]
        loss_sum = hidden_BTE.new_zeros((), dtype=accumulation_dtype(hidden_BTE.dtype))
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor] = []
        for first in range(0, positions, expected.chunk):
            here = slice(first, first + expected.chunk)
            # Contiguous, so that its product with the weight is one of matrices and not one for each example.
            hidden_BNE = hidden_BTE[:, here].detach().contiguous().requires_grad_(hidden_wanted)
            with torch.set_grad_enabled(wanted):
                loss = head.chunk_loss(
                    hidden_BNE, expected.targets_BT[:, here], first=first, positions=positions
                )
                share = loss / expected.divisor
            if wanted:
                sources = [hidden_BNE, *trained] if hidden_wanted else trained
                gradients = list(torch.autograd.grad(share, sources))
                of_hidden += [gradients.pop(0)] if hidden_wanted else []
                of_weights = _added(of_weights, gradients)
            loss_sum += loss.detach()
        ctx.divisor = expected.divisor
        ctx.of_hidden = torch.cat(of_hidden, 1) if of_hidden else None
        ctx.of_weights = [
            gradient.to(weight.dtype) for gradient, weight in zip(of_weights, trained, strict=True)
        ]
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0] * ctx.divisor
        of_hidden, of_weights = ctx.of_hidden, ctx.of_weights
        del ctx.of_hidden, ctx.of_weights  # so that they may become the weights' gradients without a copy
        of_hidden = None if of_hidden is None else of_hidden.mul_(factor)
        return of_hidden, None, None, *(gradient.mul_(factor) for gradient in of_weights)


def _added(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> list[Tensor]:
    """`sums` with `terms` added, in the accumulation type; without sums, the terms."""
    if not sums:
        return [term.to(accumulation_dtype(term.dtype)) for term in terms]
    return [total.add_(term) for total, term in zip(sums, terms, strict=True)]
