"""A small language model in plain torch that records its trace. Its twin is twin_lm_jax.py; see docs/record-a-trace.md.

python docs/examples/twin_lm_torch.py runs/lm/torch
"""

from argparse import ArgumentParser

import torch
import twin_lm_data as shared
from torch import nn
from torch.nn import functional

from parity import Recorder, Split


class Layer(nn.Module):
    """Attention and a multilayer perceptron, each added to the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[examples, tokens, width] to the same."""
        q, k, v = (
            y.unflatten(-1, (shared.HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(shared.VOCAB, width), nn.Embedding(shared.TOKENS, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(shared.LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, shared.VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids to logits."""
        x = self.tokens(ids) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument("--mean-of-means", action="store_true", help="a mistake: slices count alike")
    args = parser.parse_args()
    model, start = Model(shared.WIDTH).double(), shared.starting_weights()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in weights.values() if p.ndim > 1], weight_decay=shared.DECAY)
    optimizer.add_param_group({"params": [p for p in weights.values() if p.ndim == 1], "weight_decay": 0.0})

    fused = {name: Split([name.replace("qkv", part) for part in "qkv"]) for name in weights if "qkv" in name}
    names = {name: name for name in weights if name not in fused}
    recorder = Recorder(args.trace, names=names, split=fused, program="twin_lm_torch", precision="fp64")
    recorder.initial({name: weights[name] for name in start})
    for step in range(shared.STEPS):
        data, loss_sum = shared.batch(step), 0.0
        tokens = int((data["labels"] != shared.IGNORED).sum())
        slices = [torch.from_numpy(array).chunk(shared.SLICES) for array in data.values()]
        optimizer.zero_grad()
        for ids, labels in zip(*slices, strict=True):
            loss = functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
            divisor = shared.SLICES * (labels != shared.IGNORED).sum() if args.mean_of_means else tokens
            (loss / divisor).backward()
            loss_sum += loss.item()
        gradients = {name: p.grad.clone() for name, p in weights.items()}  # before clipping
        norm = nn.utils.clip_grad_norm_(weights.values(), shared.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = shared.rate(step)
        optimizer.step()
        moments = [
            {n: optimizer.state[p][key] for n, p in weights.items()} for key in ("exp_avg", "exp_avg_sq")
        ]
        recorder.step(
            batch=data, loss_sum=loss_sum, tokens=tokens, lr=shared.rate(step), gradients=gradients, weights=weights,
            moment1=moments[0], moment2=moments[1], grad_norm=norm.item(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
