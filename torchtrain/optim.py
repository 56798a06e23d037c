"""torch's AdamW and the global-norm clip, exactly as torch and DeepSpeed run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchtrain.weights import canonical_name
from trainspec.params import Param
from trainspec.recipe import AdamW

# torch and DeepSpeed clip with max / (norm + 1e-6).
CLIP_EPS = 1e-6


def make_optimizer(
    spec: AdamW, table: Sequence[Param], *, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW over the rows of `table`; those whose `decay` is set decay. The learning rate is set at every step.

    `parameters` is keyed by the module's names. foreach=False: tensor after tensor takes no second copy of the
    gradients, and the order of operations is the same on every device.
    """
    rows = {canonical_name(name): parameter for name, parameter in parameters.items()}
    decayed = [rows[p.name] for p in table if p.decay]
    kept = [rows[p.name] for p in table if not p.decay]
    groups = [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in ((decayed, spec.weight_decay), (kept, 0.0))
        if members
    ]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, foreach=False)
    for parameter in rows.values():
        # What AdamW itself starts from, made now so that the moments are always there to read and to restore.
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
    """How many updates Adam's bias correction believes were made."""
    for state in optimizer.state.values():
        state["step"].fill_(float(steps))


def moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adam's first and second moments, keyed like `parameters`."""
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return (
        {name: state["exp_avg"] for name, state in states.items()},
        {name: state["exp_avg_sq"] for name, state in states.items()},
    )


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all entries of all `gradients`."""
    return torch.nn.utils.get_total_norm(list(gradients), foreach=False)


@torch.no_grad()
def clip(gradients: Iterable[Tensor], *, norm: Tensor, max_norm: float) -> None:
    """Scale `gradients` in place by min(1, max_norm / (norm + CLIP_EPS))."""
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
