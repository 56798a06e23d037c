"""A small regression in plain JAX and optax that records its trace. Its twin is twin_mlp_torch.py; see docs/record-a-trace.md.

python docs/examples/twin_mlp_jax.py runs/mlp/jax
"""

from argparse import ArgumentParser
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from twin_mlp_data import LR, STEPS, batch, starting_weights

from parity import Recorder

# Own names to names that both sides agree on. A kernel is [in, out], torch's weight [out, in].
NAMES = {
    "hidden/kernel": "0.weight",
    "hidden/bias": "0.bias",
    "out/kernel": "2.weight",
    "out/bias": "2.bias",
}
KERNELS = ("hidden/kernel", "out/kernel")


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", type=Path, help="where the trace goes")
    parser.add_argument(
        "--divide-by-examples",
        action="store_true",
        help="a mistake: gradients of the sum over the examples' number",
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    start = starting_weights()
    weights = {
        name: jnp.asarray(start[torchs].T if name in KERNELS else start[torchs])
        for name, torchs in NAMES.items()
    }
    optimizer = optax.adamw(LR, weight_decay=0.01)
    state = optimizer.init(weights)

    recorder = Recorder(args.trace, names=NAMES, transpose=KERNELS, program="twin_mlp_jax", precision="fp64")
    recorder.initial(weights)
    for step in range(STEPS):
        inputs, targets = batch(step)
        divisor = len(targets) if args.divide_by_examples else targets.size
        loss_sum, gradients = jax.value_and_grad(squared_error)(weights, inputs, targets)
        gradients = {name: gradient / divisor for name, gradient in gradients.items()}
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        recorder.step(
            batch={"inputs": inputs, "targets": targets},
            loss_sum=loss_sum.item(),
            tokens=targets.size,
            lr=LR,
            gradients=gradients,
            weights=weights,
            moment1=state[0].mu,
            moment2=state[0].nu,
        )


def squared_error(weights: dict[str, jax.Array], inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The sum over the batch; `weights` by own names."""
    hidden = jnp.tanh(inputs @ weights["hidden/kernel"] + weights["hidden/bias"])
    return jnp.sum((hidden @ weights["out/kernel"] + weights["out/bias"] - targets) ** 2)


if __name__ == "__main__":
    main()
