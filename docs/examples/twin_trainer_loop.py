"""What the transformers Trainer does, as a plain loop. Its twin is twin_trainer_hf.py; see docs/record-a-trace.md.

python docs/examples/twin_trainer_loop.py runs/trainer/loop
"""

from argparse import ArgumentParser

import torch
import twin_trainer_data as shared

from parity import Recorder


def rate(step: int) -> float:
    """A linear warm-up that starts at 0, and a linear decay that would reach 0 after the last update."""
    if step < shared.WARMUP:
        return shared.LR * step / shared.WARMUP
    return shared.LR * (shared.STEPS - step) / (shared.STEPS - shared.WARMUP)


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument("--mean-of-means", action="store_true", help="a mistake: slices count alike")
    args = parser.parse_args()
    model = shared.model()
    weights = dict(model.named_parameters())
    decayed = [p for p in weights.values() if p.ndim > 1]
    optimizer = torch.optim.AdamW(decayed, weight_decay=shared.DECAY)
    optimizer.add_param_group({"params": [p for p in weights.values() if p.ndim == 1], "weight_decay": 0.0})

    names = {name: name for name in weights}
    recorder = Recorder(args.trace, names=names, program="a plain loop", precision="fp64")
    recorder.initial(weights)
    examples, size = shared.examples(), shared.SLICES * shared.EXAMPLES
    for step in range(shared.STEPS):
        rows = examples[step * size : (step + 1) * size]
        data = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
        targets = data["labels"][:, 1:] != shared.IGNORED
        loss_sum = 0.0
        optimizer.zero_grad()
        for ids, labels, mask in zip(
            *(array.chunk(shared.SLICES) for array in (*data.values(), targets)), strict=True
        ):
            divisor = shared.SLICES * mask.sum() if args.mean_of_means else targets.sum()
            loss = shared.token_loss(model(ids), labels, divisor)
            loss.backward()
            loss_sum += loss.item() * int(divisor)
        gradients = {name: p.grad.clone() for name, p in weights.items()}
        torch.nn.utils.clip_grad_norm_(weights.values(), shared.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        moments = [
            {n: optimizer.state[p][key] for n, p in weights.items()} for key in ("exp_avg", "exp_avg_sq")
        ]
        recorder.step(
            batch=data, loss_sum=loss_sum, tokens=int(targets.sum()), lr=rate(step), gradients=gradients,
            weights=weights, moment1=moments[0], moment2=moments[1],
        )  # fmt: skip


if __name__ == "__main__":
    main()
