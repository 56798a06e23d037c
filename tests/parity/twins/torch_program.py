"""The model in torch: writes a trace for each case of argv, a case being OPTIMIZER or OPTIMIZER:MISTAKE.

python tests/parity/twins/torch_program.py HOME DTYPE CASE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import shared
import torch
from torch.nn import functional

from parity import Recorder

POINTS = ("conv", "bn", "act", "pooled", "hidden", "norm", "output")
State = dict[str, torch.Tensor]


def forward(weights: State, images: torch.Tensor, wrong: str) -> State:
    """All points of one accumulation slice; the running statistics are updated in place."""
    gelu = {"approximate": "tanh" if wrong == "tanh" else "none"}
    if wrong == "padding":  # what SAME means elsewhere
        conv = functional.conv2d(functional.pad(images, (0, 1, 0, 1)), weights["conv.weight"], stride=2)
    else:
        conv = functional.conv2d(images, weights["conv.weight"], stride=2, padding=1)
    var = 0.9 * weights["bn.running_var"] + 0.1 * conv.detach().var((0, 2, 3), unbiased=False)
    bn = functional.batch_norm(
        conv, weights["bn.running_mean"], weights["bn.running_var"], weights["bn.weight"], weights["bn.bias"],
        training=True,
    )  # fmt: skip
    weights["bn.num_batches_tracked"] += 1
    if wrong == "biased":
        weights["bn.running_var"] = var  # in place, it would be what the backward pass has saved
    act = functional.gelu(bn, **gelu)
    pooled = functional.linear(act.mean((2, 3)), weights["frozen.weight"])
    hidden = functional.gelu(
        functional.linear(pooled, weights["hidden.weight"], weights["hidden.bias"]), **gelu
    )
    eps = shared.NORM_EPS * (100 if wrong == "eps" else 1)
    norm = functional.layer_norm(hidden, (16,), weights["norm.weight"], weights["norm.bias"], eps=eps)
    output = functional.linear(norm, weights["head.weight"], weights["head.bias"])
    return dict(zip(POINTS, (conv, bn, act, pooled, hidden, norm, output), strict=True))


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, groups, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        first, second = shared.BETAS
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                sign = torch.sign(first * m + (1 - first) * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
                m.mul_(second).add_(p.grad, alpha=1 - second)


class Adafactor(torch.optim.Optimizer):
    """Shazeer & Stern 2018, arXiv:1804.04235, with a plain mean over steps and without scaling by the weight."""

    def __init__(self, groups, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "t": 0})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            group["t"] += 1
            for p in group["params"]:
                update = self.scaled(
                    p, float(1 - np.float32(1) / np.float32(group["t"]))
                )  # optax has it in float32
                p.sub_(group["lr"] * update / max(1.0, update.square().mean().sqrt().item()))

    def scaled(self, p: torch.Tensor, decay: float) -> torch.Tensor:
        """The gradient over the root of its running square, factored where both dimensions are at least 8."""
        square, state = p.grad**2 + 1e-30, self.state[p]
        if p.ndim == 2 and min(p.shape) >= 8:
            longest = 0 if p.shape[0] >= p.shape[1] else 1
            for slot, dim in (("v_row", longest), ("v_col", 1 - longest)):
                mean = square.mean(dim)
                state[slot] = decay * state.get(slot, torch.zeros_like(mean)) + (1 - decay) * mean
            row, col = state["v_row"] / state["v_row"].mean(), state["v_col"]
            return p.grad * (row.unsqueeze(longest) * col.unsqueeze(1 - longest)).rsqrt()
        state["v"] = decay * state.get("v", torch.zeros_like(p)) + (1 - decay) * square
        return p.grad * state["v"].rsqrt()


def optimizer(name: str, trained: State, wrong: str) -> torch.optim.Optimizer:
    """The optimizer of a case, decaying matrices only."""
    decay = shared.DECAY * (1.5 if wrong == "decay" else 1.0)
    decayed = [p for p in trained.values() if p.ndim > 1 or wrong == "mask"]
    plain = [p for p in trained.values() if not (p.ndim > 1 or wrong == "mask")]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    match name:
        case "adamw":
            kind = torch.optim.Adam if wrong == "l2" else torch.optim.AdamW
            return kind(groups, lr=1.0, betas=shared.BETAS, eps=shared.EPS)
        case "lion":
            return Lion(groups, 1.0)
        case "adafactor":
            return Adafactor(list(trained.values()), 1.0)
        case _:
            momentum = 0.875 if name == "momentum" else 0.0
            return torch.optim.SGD(trained.values(), lr=1.0, momentum=momentum, nesterov=wrong == "nesterov")


SLOTS = {"exp_avg": "moment1", "exp_avg_sq": "moment2", "momentum_buffer": "momentum", "step": ""}


def slots(rule: torch.optim.Optimizer, trained: State) -> dict[str, State]:
    """The optimizer's state by slot."""
    by_slot: dict[str, State] = {}
    for name, p in trained.items():
        for key, value in rule.state[p].items():
            if value is not None and SLOTS.get(key, key):
                by_slot.setdefault(SLOTS.get(key, key), {})[name] = value
    return by_slot


def train(home: Path, dtype: str, case: str) -> None:
    """Train and record."""
    name, _, wrong = case.partition(":")
    weights = {n: torch.from_numpy(a.copy()) for n, a in shared.starting_weights(dtype).items()}
    trained = {n: weights[n].requires_grad_() for n in shared.TRAINED}
    rule = optimizer(name, trained, wrong)
    recorder = Recorder(home / f"torch-{case.replace(':', '-')}-{dtype}", names={n: n for n in weights})
    recorder.initial(weights)
    for step in range(1, shared.STEPS + 1):
        data, losses, points = shared.batch(step, dtype), 0.0, []
        images, targets = (torch.from_numpy(a).chunk(shared.SLICES) for a in data.values())
        rule.zero_grad()
        for image, target in zip(images, targets, strict=True):
            seen = forward(weights, image, wrong)
            aim = target + 0.1 * functional.linear(seen["norm"].detach(), weights["target.weight"])
            loss_sum = ((seen["output"] - aim) ** 2).sum()
            (loss_sum / (shared.EXAMPLES * 4)).backward()
            losses += loss_sum.item()
            points.append(seen)
        gradients = {n: p.grad.clone() for n, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1e9 if wrong == "clip" else shared.CLIP)
        lr = shared.rate(step, offset=int(wrong == "warmup"))
        for group in rule.param_groups:
            group["lr"] = lr
        rule.step()
        with torch.no_grad():
            tau = shared.TAU * (1.1 if wrong == "tau" else 1.0)
            weights["target.weight"].lerp_(weights["head.weight"], tau)
            if wrong == "frozen":
                weights["frozen.weight"].mul_(1 - lr * shared.DECAY)
        recorder.step(
            batch=data, loss_sum=losses, tokens=shared.EXAMPLES * 4, lr=lr, gradients=gradients, weights=weights,
            slots=slots(rule, trained), grad_norm=norm.item(),
            activations={p: torch.cat([seen[p] for seen in points]) for p in POINTS},
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        train(Path(sys.argv[1]), sys.argv[2], each)
