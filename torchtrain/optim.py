"""torch's AdamW and the global-norm clip, exactly as torch and DeepSpeed run them."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from trainspec.recipe import AdamW

# torch.nn.utils.clip_grad_norm_ and DeepSpeed clip by max / (norm + 1e-6).
CLIP_EPS = 1e-6


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
    """AdamW over `parameters`, with decay for the names in `decayed` only; set_learning_rate goes before an update.

    foreach=False: tensor after tensor takes no second copy of the gradients, and it is the order of operations
    that a GPU and a CPU share. Differs from jaxtrain, whose optimizer knows its weights by their names alone.
    """
    groups = [
        {
            "params": [p for name, p in parameters.items() if (name in decayed) == decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, spec.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, foreach=False)
    for parameter in parameters.values():
        # What AdamW itself starts from, made now so that the moments are there to be read and restored.
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """The rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """How many updates were made, for Adam's bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(float(steps))


def moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adam's first and second moments, by the names of `parameters`."""
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return (
        {name: state["exp_avg"] for name, state in states.items()},
        {name: state["exp_avg_sq"] for name, state in states.items()},
    )
