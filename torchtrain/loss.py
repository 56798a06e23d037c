"""The loss is a sum and a count; whoever knows the global count divides, once."""

# B examples, S sequence, V vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtrain.tensor import Peers, cross_entropy_sum
from trainspec.data import IGNORED


def token_loss(logits: Tensor, labels: Tensor, *, tensor: Peers) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies of `logits` [B, S, V], number of target tokens).

    `labels` [B, S] stand at their token's own position; the logits at s predict the label at s + 1. Labels equal
    to IGNORED count for nothing. Computed in float32, in float64 where the logits are. Differs from jaxtrain, where
    the compiler knows what is split: here each of the `tensor` peers has its part of V.
    """
    # Shifting the labels instead of the logits saves a copy of the largest tensor of the step.
    targets_BS = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wide_BSV = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss_sum = cross_entropy_sum(wide_BSV.flatten(0, 1), targets_BS.flatten(), tensor)
    return loss_sum, (targets_BS != IGNORED).sum()
