"""A small regression in plain torch that records its trace. Its twin is twin_mlp_jax.py; see docs/record-a-trace.md.

python docs/examples/twin_mlp_torch.py runs/mlp/torch
"""

from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from twin_mlp_data import HIDDEN, INPUTS, LR, OUTPUTS, STEPS, batch, starting_weights

from parity import Recorder

# Own names to names that both sides agree on: here torch's own.
NAMES = {name: name for name in ("0.weight", "0.bias", "2.weight", "2.bias")}


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", type=Path, help="where the trace goes")
    parser.add_argument("--eps-inside", action="store_true", help="a mistake: Adam's eps inside the root")
    args = parser.parse_args()
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
    ).double()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in starting_weights().items()})
    optimizer = (AdamEpsInside if args.eps_inside else torch.optim.AdamW)(
        model.parameters(), lr=LR, weight_decay=0.01
    )

    recorder = Recorder(args.trace, names=NAMES, program="twin_mlp_torch", precision="fp64")
    recorder.initial(numpy_of(dict(model.named_parameters())))
    for step in range(STEPS):
        inputs, targets = batch(step)
        predicted = model(torch.from_numpy(inputs))
        loss_sum = torch.sum((predicted - torch.from_numpy(targets)) ** 2)
        optimizer.zero_grad()
        (loss_sum / targets.size).backward()
        gradients = numpy_of({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
        states = {name: optimizer.state[p] for name, p in model.named_parameters()}
        recorder.step(
            batch={"inputs": inputs, "targets": targets},
            loss_sum=loss_sum.item(),
            tokens=targets.size,
            lr=LR,
            gradients=gradients,
            weights=numpy_of(dict(model.named_parameters())),
            moment1=numpy_of({name: state["exp_avg"] for name, state in states.items()}),
            moment2=numpy_of({name: state["exp_avg_sq"] for name, state in states.items()}),
        )


def numpy_of(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a Recorder takes."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


class AdamEpsInside(torch.optim.AdamW):
    """The planted mistake: sqrt(v + eps) instead of sqrt(v) + eps."""

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                m = state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                v = state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m, v = m / (1 - b1 ** state["step"]), v / (1 - b2 ** state["step"])
                p.sub_(lr * (m / torch.sqrt(v + group["eps"]) + group["weight_decay"] * p))


if __name__ == "__main__":
    main()
