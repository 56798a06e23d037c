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
    if wrong == "tf32":
        conv = functional.conv2d(tf32(images), tf32(weights["conv.weight"]), stride=2, padding=1)
    var = 0.9 * weights["bn.running_var"] + 0.1 * conv.detach().var((0, 2, 3), unbiased=False)
    bn = functional.batch_norm(
        conv, weights["bn.running_mean"], weights["bn.running_var"], weights["bn.weight"], weights["bn.bias"],
        training=True, momentum=0.01 if wrong == "bn_momentum" else 0.1, eps=1e-3 if wrong == "bn_eps" else 1e-5,
    )  # fmt: skip
    weights["bn.num_batches_tracked"] += 1
    if wrong == "biased":
        weights["bn.running_var"] = var  # in place, it would be what the backward pass has saved
    act = functional.gelu(bn, **gelu)
    pooled = functional.linear(act.mean((2, 3)), weights["frozen.weight"])
    hidden = functional.gelu(
        functional.linear(pooled, weights["hidden.weight"], weights["hidden.bias"]), **gelu
    )
    if wrong == "dropout":
        hidden = functional.dropout(hidden, 0.1)
    eps = shared.NORM_EPS * (100 if wrong == "eps" else 1)
    norm = functional.layer_norm(hidden, (16,), weights["norm.weight"], weights["norm.bias"], eps=eps)
    output = functional.linear(norm, weights["head.weight"], weights["head.bias"])
    return dict(zip(POINTS, (conv, bn, act, pooled, hidden, norm, output), strict=True))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits that a matmul or a convolution keeps where TF32 is allowed; the gradient passes."""
    mantissa, exponent = torch.frexp(x.detach())
    rounded = torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)
    return x + (rounded - x.detach())


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


class Adam(torch.optim.Optimizer):
    """AdamW with what torch's own has no setting for: a first moment in bfloat16, eps under the root."""

    def __init__(self, groups, lr: float, *, stored: torch.dtype | None, wrong: str = "") -> None:
        super().__init__(groups, {"lr": lr, "t": 0})
        self.stored, self.wrong = stored, wrong

    @torch.no_grad()
    def step(self) -> None:
        """One update; as in optax, the update is made before its moment is rounded."""
        first, second = shared.BETAS
        for group in self.param_groups:
            group["t"] += 1
            decay = group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                gradient = p.grad + decay * p if self.wrong == "l2" else p.grad
                m = state.get("exp_avg", torch.zeros_like(p, dtype=self.stored or p.dtype))
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                m = first * m + (1 - first) * gradient
                v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
                state["exp_avg"] = m.to(self.stored or p.dtype)
                used = state["exp_avg"].to(p.dtype) if self.wrong == "stored" else m
                used, root = used / (1 - first ** group["t"]), v / (1 - second ** group["t"])
                if self.wrong == "eps_root":
                    scaled = used / (root + shared.EPS).sqrt()
                else:
                    scaled = used / (root.sqrt() + shared.EPS)
                p.mul_(1 - group["lr"] * (0.0 if self.wrong == "l2" else decay)).sub_(group["lr"] * scaled)


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with optax's bias correction of both terms."""

    def __init__(self, groups, lr: float, *, wrong: str) -> None:
        super().__init__(groups, {"lr": lr, "t": 0})
        self.wrong = wrong

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        b = shared.MUON_BETA
        for group in self.param_groups:
            group["t"] += 1
            corrected = (0, 0) if self.wrong == "uncorrected" else (b ** (group["t"] + 1), b ** group["t"])
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(b).add_(p.grad, alpha=1 - b)
                x = orthogonalized(b * m / (1 - corrected[0]) + (1 - b) * p.grad / (1 - corrected[1]))
                rows, columns = p.shape
                scale = max(1.0, rows / columns) ** 0.5
                if self.wrong == "scale":  # Liu et al. 2025, arXiv:2502.16982
                    scale = 0.2 * max(rows, columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * scale * x)


def orthogonalized(x: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton-Schulz; the shorter side comes first."""
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T).T
    x = x / (torch.linalg.norm(x) + shared.MUON_EPS)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


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


def optimizers(name: str, trained: State, wrong: str) -> list[torch.optim.Optimizer]:
    """The optimizers of a case, decaying matrices only; Muon leaves all but matrices to Adam."""
    decay = shared.DECAY * (1.5 if wrong == "decay" else 1.0)
    decayed = [p for p in trained.values() if p.ndim > 1 or wrong == "mask"]
    plain = [p for p in trained.values() if not (p.ndim > 1 or wrong == "mask")]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    match name:
        case "adamw" if wrong == "eps_root":
            return [Adam(groups, 1.0, stored=None, wrong=wrong)]
        case "adamw":
            kind = torch.optim.Adam if wrong == "l2" else torch.optim.AdamW
            eps = 1e-6 if wrong == "adam_eps" else shared.EPS
            return [kind(groups, lr=1.0, betas=shared.BETAS, eps=eps)]
        case "adamw_bf16":
            stored = None if wrong == "full_moments" else torch.bfloat16
            return [Adam(groups, 1.0, stored=stored, wrong=wrong)]
        case "lion":
            return [Lion(groups, 1.0)]
        case "adafactor":
            return [Adafactor(list(trained.values()), 1.0)]
        case "muon":
            matrices = [{"params": [p for p in trained.values() if p.ndim == 2], "weight_decay": decay}]
            others = [{"params": [p for p in trained.values() if p.ndim != 2], "weight_decay": 0.0}]
            first = Muon(matrices, 1.0, wrong=wrong)
            if wrong == "torch":
                first = torch.optim.Muon(matrices, lr=1.0, momentum=shared.MUON_BETA)
            return [first, torch.optim.AdamW(others, lr=1.0, betas=shared.BETAS, eps=shared.EPS)]
        case _:
            momentum = 0.875 if name == "momentum" else 0.0
            return [
                torch.optim.SGD(
                    trained.values(), lr=1.0, momentum=momentum, nesterov=wrong == "nesterov",
                    dampening=0.125 if wrong == "dampening" else 0.0,
                )
            ]  # fmt: skip


SLOTS = {"exp_avg": "moment1", "exp_avg_sq": "moment2", "momentum_buffer": "momentum", "step": ""}


def slots(rules: list[torch.optim.Optimizer], trained: State) -> dict[str, State]:
    """The optimizers' state by slot."""
    by_slot: dict[str, State] = {}
    for name, p in trained.items():
        state = next((rule.state[p] for rule in rules if p in rule.state), {})
        for key, value in state.items():
            if value is not None and SLOTS.get(key, key):
                by_slot.setdefault(SLOTS.get(key, key), {})[name] = value
    return by_slot


def started(dtype: str, wrong: str) -> State:
    """The starting weights, or what a mistake makes of them."""
    weights = {n: torch.from_numpy(a.copy()) for n, a in shared.starting_weights(dtype).items()}
    match wrong:
        case "kernel":  # height and width in the other order
            weights["conv.weight"] = weights["conv.weight"].transpose(2, 3).contiguous()
        case "transposed":
            weights["frozen.weight"] = weights["frozen.weight"].T.contiguous()
        case "init":
            torch.manual_seed(0)
            torch.nn.init.kaiming_uniform_(weights["conv.weight"], a=5**0.5)
    return weights


def clipped(trained: State, wrong: str) -> float:
    """The norm before clipping."""
    if wrong == "clip_eps":  # as optax: without the 1e-6
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad) for p in trained.values()])
        )
        for p in trained.values():
            p.grad.mul_(min(1.0, shared.CLIP / norm.item()))
        return norm.item()
    return torch.nn.utils.clip_grad_norm_(trained.values(), 1e9 if wrong == "clip" else shared.CLIP).item()


def step_state(weights: State, lr: float, wrong: str) -> None:
    """What an update does besides the optimizer: the target network; and mistakes."""
    with torch.no_grad():
        tau = shared.TAU * (1.1 if wrong == "tau" else 1.0)
        weights["target.weight"].lerp_(weights["head.weight"], tau)
        if wrong == "frozen":
            weights["frozen.weight"].mul_(1 - lr * shared.DECAY)
        if wrong == "bf16_weights":
            for name in shared.TRAINED:
                weights[name].copy_(weights[name].bfloat16())


def train(home: Path, dtype: str, case: str) -> None:
    """Train and record."""
    name, _, wrong = case.partition(":")
    weights = started(dtype, wrong)
    trained = {n: weights[n].requires_grad_() for n in shared.TRAINED}
    rules = optimizers(name, trained, wrong)
    recorder = Recorder(home / f"torch-{case.replace(':', '-')}-{dtype}", names={n: n for n in weights})
    recorder.initial(weights)
    divisor = shared.EXAMPLES * (1 if wrong == "mean" else 4)
    for step in range(1, shared.STEPS + 1):
        data, losses, points = shared.batch(step, dtype), 0.0, []
        images, targets = (torch.from_numpy(a).chunk(shared.SLICES) for a in data.values())
        for p in trained.values():
            p.grad = None
        for image, target in zip(images, targets, strict=True):
            seen = forward(weights, image, wrong)
            aim = target + 0.1 * functional.linear(seen["norm"].detach(), weights["target.weight"])
            loss_sum = ((seen["output"] - aim) ** 2).sum()
            (loss_sum / divisor).backward()
            if wrong == "clip_slices":
                torch.nn.utils.clip_grad_norm_(trained.values(), shared.CLIP)
            losses += loss_sum.item()
            points.append(seen)
        gradients = {n: p.grad.clone() for n, p in trained.items()}
        norm = clipped(trained, wrong)
        lr = shared.rate(step, offset=int(wrong == "warmup"))
        lr = float(np.float32(lr)) if wrong == "float32_rate" else lr
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = float(np.float32(lr)) if wrong == "hidden_rate" else lr
            rule.step()
        step_state(weights, lr, wrong)
        recorder.step(
            batch=data, loss_sum=losses, tokens=shared.EXAMPLES * 4, lr=lr, gradients=gradients, weights=weights,
            slots=slots(rules, trained), grad_norm=norm,
            activations={p: torch.cat([seen[p] for seen in points]) for p in POINTS},
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        train(Path(sys.argv[1]), sys.argv[2], each)
