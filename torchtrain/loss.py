"""The loss is a sum and a count; who knows the global count divides, once."""

# B examples, S sequence, T tokens, V vocabulary

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchtrain.mesh import Peers
from torchtrain.precision import accumulation_dtype
from trainspec.data import IGNORED


def token_loss(logits: Tensor, labels: Tensor, *, tensor: Peers) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies of `logits` [B, S, V], number of target tokens).

    `labels` [B, S] stand at their token's own position; the logits at s predict the label at s + 1. Labels equal
    to IGNORED do not count. Computed in the accumulation type. Differs from jaxtrain, where the compiler knows what is
    split: here each of the `tensor` peers has its shard of V.
    """
    # Shifting the labels instead of the logits saves a copy of the largest tensor of the step.
    return target_loss(logits, targets_of(labels), tensor=tensor)


def targets_of(labels_BS: Tensor) -> Tensor:
    """What the logits of each position predict: the next one's label; the last ones predict nothing."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)


def target_loss(logits: Tensor, targets_BS: Tensor, *, tensor: Peers) -> tuple[Tensor, Tensor]:
    """`token_loss` where `targets_BS` stand at the positions whose logits predict them."""
    wide_BSV = logits.to(accumulation_dtype(logits.dtype))
    loss_sum = cross_entropy_sum(wide_BSV.flatten(0, 1), targets_BS.flatten(), tensor)
    return loss_sum, (targets_BS != IGNORED).sum()


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor, peers: Peers) -> Tensor:
    """Summed cross-entropy of logits whose vocabulary the peers split; targets equal to IGNORED do not count."""
    if peers.size == 1:
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    return _VocabCrossEntropy.apply(logits_TV, targets_T, peers)  # pyright: ignore[reportReturnType]


class _VocabCrossEntropy(torch.autograd.Function):
    """log of the sum of exponentials less the target's logit, from shards: two numbers per token are sent."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, peers: Peers) -> Tensor:
        largest_T = logits_TV.amax(-1)
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=peers.group)
        shifted_TV = logits_TV - largest_T[:, None]
        local_T = targets_T - peers.index * logits_TV.shape[-1]
        mine_T = (local_T >= 0) & (local_T < logits_TV.shape[-1])
        local_T = local_T.masked_fill(~mine_T, 0)
        picked_T = shifted_TV.gather(-1, local_T[:, None])[:, 0].masked_fill(~mine_T, 0)
        share_TV = shifted_TV.exp_()
        both_2T = peers.sum_(torch.stack((share_TV.sum(-1), picked_T)))
        counted_T = targets_T != IGNORED
        share_TV.div_(both_2T[0][:, None]).mul_(counted_T[:, None])
        ctx.save_for_backward(share_TV, local_T, mine_T)  # an IGNORED target is no peer's
        return (both_2T[0].log() - both_2T[1]).masked_fill(~counted_T, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        share_TV, local_T, mine_T = ctx.saved_tensors
        slope_TV = share_TV.scatter_add(-1, local_T[:, None], -mine_T[:, None].to(share_TV.dtype))
        return slope_TV.mul_(grads[0]), None, None
