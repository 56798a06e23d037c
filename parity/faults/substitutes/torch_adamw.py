"""AdamW written out, to replace torch's."""

from __future__ import annotations

from typing import Any

import torch


class ExplicitAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its update in four lines."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """p -= lr * (m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + decay * p)."""
        for group in self.param_groups:
            (b1, b2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
            for p in group["params"]:
                s = self.state[p]
                s["step"] += 1
                t = s["step"].item()
                s["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                s["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m = s["exp_avg"] / (1 - b1**t)
                v = s["exp_avg_sq"] / (1 - b2**t)
                p.sub_(lr * m / (v.sqrt() + eps) + lr * decay * p)
