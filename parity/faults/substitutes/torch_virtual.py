"""Virtual tokens treated wrongly."""

# N virtual tokens, K kv heads, D head dim, L layers, E embed

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rotated(
    both_LKND: Tensor, tables: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens_1N: Tensor
) -> list[Tensor]:
    """Keys and values in turn, the keys rotated like those of tokens at these positions."""
    cos, sin = tables(both_LKND, tokens_1N)
    first, second = both_LKND.chunk(2, -1)
    turned_LKND = both_LKND * cos + torch.cat((-second, first), -1) * sin
    return [(turned_LKND, both_LKND)[i % 2][i] for i in range(len(both_LKND))]


def with_frozen_head(encoder: nn.Module, tokens_1N: Tensor) -> Tensor:
    """The encoder's output, with a gradient of zero for its `mlp_head`."""
    head = {name: p for name, p in encoder.named_parameters() if name.startswith("mlp_head")}
    still = {name: p.detach() for name, p in head.items()}
    virtual_1NE: Tensor = torch.func.functional_call(encoder, still, (tokens_1N,))
    return virtual_1NE + 0 * sum(p.sum() for p in head.values())
