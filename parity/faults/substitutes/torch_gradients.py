"""Gradients summed in a narrower type than the contract says."""

from __future__ import annotations

from torch import nn


def round_gradients(model: nn.Module) -> None:
    """Round every gradient to bfloat16, in its own type."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.bfloat16())
