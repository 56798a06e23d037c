"""torch's AdamW, and the clip by the global norm as torch and DeepSpeed compute it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from trainspec.recipe import AdamW

# torch.nn.utils.clip_grad_norm_ and DeepSpeed clip by max / (norm + 1e-6).
CLIP_EPS = 1e-6
# torch's names of Adam's moments.
MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """sqrt of the sum of squares over every element of every tensor."""
    return torch.nn.utils.get_total_norm(list(gradients.values()), foreach=False)


@torch.no_grad()
def clip(gradients: Mapping[str, Tensor], norm: Tensor, *, max_norm: float) -> None:
    """Every gradient times min(1, max_norm / (norm + 1e-6)), in place."""
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor)


def make_optimizer(
    spec: AdamW, decayed: Set[str], *, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW over `parameters`, with decay for the names in `decayed` only; `set_learning_rate` comes before an update.

    fused: one pass over each weight and its moments, and no copy of a gradient. Differs from jaxtrain, whose optimizer is
    not given its weights.
    """
    groups = [
        {
            "params": [p for name, p in parameters.items() if (name in decayed) == decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, spec.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def start_moments(optimizer: torch.optim.AdamW, tensors: Iterable[Tensor]) -> None:
    """Make the moments that AdamW itself would make at its first update, so that they can be read and restored before.

    `tensors` are what the optimizer updates: the parameters, or the flat buffers that DeepSpeed makes of them.
    """
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS.values()},
        }


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Set the rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Set the number of updates made so far, for Adam's bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(float(steps))
