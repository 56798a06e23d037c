"""A classifier with batch normalisation in plain torch. Its twin is twin_bn_jax.py; see docs/record-a-trace.md.

python docs/examples/twin_bn_torch.py runs/bn/torch
"""

from argparse import ArgumentParser

import torch
import twin_bn_data as shared
from torch import nn
from torch.nn import functional

from parity import Recorder


class Model(nn.Module):
    """A convolution at stride 2, batch normalisation, a mean over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, shared.CHANNELS, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(shared.CHANNELS)
        self.head = nn.Linear(shared.CHANNELS, shared.CLASSES)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every point that is recorded, in order."""
        conv = self.conv(images)
        bn = self.bn(conv)
        return {"conv": conv, "bn": bn, "logits": self.head(functional.relu(bn).mean((2, 3)))}


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument("--eval-mode", action="store_true", help="a mistake: running statistics in training")
    args = parser.parse_args()
    model, start = Model().double().train(not args.eval_mode), shared.starting_weights()
    state = {name: torch.from_numpy(array) for name, array in start.items()}
    # The counter that torch keeps beside the statistics has no twin in flax.
    model.load_state_dict(state | {"bn.num_batches_tracked": torch.tensor(0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=shared.LR, momentum=shared.MOMENTUM)

    names = {name: name for name in start}
    recorder = Recorder(args.trace, names=names, program="twin_bn_torch", precision="fp64")
    recorder.initial({name: model.state_dict()[name] for name in names})
    for step in range(shared.STEPS):
        data = shared.batch(step)
        points = model(torch.from_numpy(data["images"]))
        loss_sum = functional.cross_entropy(
            points["logits"], torch.from_numpy(data["classes"]), reduction="sum"
        )
        optimizer.zero_grad()
        (loss_sum / shared.EXAMPLES).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        recorder.step(
            batch=data, loss_sum=loss_sum.item(), tokens=shared.EXAMPLES, lr=shared.LR, gradients=gradients,
            weights={name: model.state_dict()[name] for name in names}, slots={"momentum": momentum},
            activations=points,
        )  # fmt: skip


if __name__ == "__main__":
    main()
