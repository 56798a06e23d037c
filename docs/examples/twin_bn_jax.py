"""A classifier with batch normalisation in flax.nnx and optax. Its twin is twin_bn_torch.py; see docs/record-a-trace.md.

python docs/examples/twin_bn_jax.py runs/bn/jax
"""

from argparse import ArgumentParser

import jax
import jax.numpy as jnp
import optax
import twin_bn_data as shared
from flax import nnx

from parity import Recorder

# Own names to names that both sides agree on, in the order of the forward pass.
NAMES = {
    "conv/kernel": "conv.weight",
    "bn/scale": "bn.weight",
    "bn/bias": "bn.bias",
    "bn/mean": "bn.running_mean",
    "bn/var": "bn.running_var",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}


class Model(nnx.Module):
    """A convolution at stride 2, batch normalisation, a mean over positions, a head; images are channels last."""

    def __init__(self) -> None:
        options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        # padding="SAME" would pad (0, 1) here, where torch pads (1, 1).
        self.conv = nnx.Conv(3, shared.CHANNELS, (3, 3), strides=2, padding=1, use_bias=False, **options)
        self.bn = nnx.BatchNorm(shared.CHANNELS, momentum=0.9, **options)  # torch's momentum=0.1
        self.head = nnx.Linear(shared.CHANNELS, shared.CLASSES, **options)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Every point that is recorded, in order."""
        conv = self.conv(images)
        bn = self.bn(conv)
        return {"conv": conv, "bn": bn, "logits": self.head(nnx.relu(bn).mean((1, 2)))}


def loss(model: Model, images: jax.Array, classes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over the examples, and the points."""
    points = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(points["logits"], classes)
    return losses.mean(), points


def named(state: nnx.State) -> dict[str, jax.Array]:
    """By own names."""
    return {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument(
        "--biased", action="store_true", help="a mistake: the running variance as flax has it"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    model, start = Model(), shared.starting_weights()
    layouts = {"conv/kernel": (2, 3, 1, 0), "head/kernel": (1, 0)}
    for own, torchs in NAMES.items():
        module, leaf = own.split("/")
        array = start[torchs].transpose(layouts.get(own))
        getattr(getattr(model, module), leaf).set_value(jnp.asarray(array))
    optimizer = nnx.Optimizer(model, optax.sgd(shared.LR, shared.MOMENTUM), wrt=nnx.Param)

    recorder = Recorder(
        args.trace, names=NAMES, transpose=["head/kernel"], permute={"conv/kernel": (3, 2, 0, 1)},
        program="twin_bn_jax", precision="fp64",
    )  # fmt: skip
    recorder.initial(named(nnx.state(model)))
    for step in range(shared.STEPS):
        data, before = shared.batch(step), model.bn.var[...]
        images = jnp.asarray(data["images"]).transpose(0, 2, 3, 1)
        (value, points), gradients = nnx.value_and_grad(loss, has_aux=True)(model, images, data["classes"])
        optimizer.update(model, gradients)
        if not args.biased:  # torch's running variance is unbiased, flax's is not
            share = shared.POSITIONS / (shared.POSITIONS - 1)
            model.bn.var.set_value(0.9 * before + (model.bn.var[...] - 0.9 * before) * share)
        recorder.step(
            batch=data, loss_sum=value.item() * shared.EXAMPLES, tokens=shared.EXAMPLES, lr=shared.LR,
            gradients=named(gradients), weights=named(nnx.state(model)),
            slots={"momentum": named(optimizer.opt_state[0].trace)},
            activations={n: p.transpose(0, 3, 1, 2) if p.ndim == 4 else p for n, p in points.items()},
        )  # fmt: skip


if __name__ == "__main__":
    main()
