"""The model in JAX and optax, with kernels [in, out] and [height, width, in, out]: writes a trace for each case of argv.

python tests/parity/twins/jax_program.py HOME DTYPE OPTIMIZER...
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import shared

from parity import Recorder

KERNELS = ("hidden.weight", "head.weight", "frozen.weight", "target.weight")
POINTS = ("conv", "bn", "act", "pooled", "hidden", "norm", "output")


def forward(trained, state, images):
    """(output, points, statistics) of one accumulation slice."""
    x = jnp.transpose(images, (0, 2, 3, 1))
    layout = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(
        x, trained["conv.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout
    )
    mean, var = jnp.mean(conv, (0, 1, 2)), jnp.var(conv, (0, 1, 2))
    count = conv.size // conv.shape[-1]
    statistics = {
        "bn.running_mean": 0.9 * state["bn.running_mean"] + 0.1 * mean,
        "bn.running_var": 0.9 * state["bn.running_var"] + 0.1 * var * count / (count - 1),
        "bn.num_batches_tracked": state["bn.num_batches_tracked"] + 1,
    }
    bn = (conv - mean) / jnp.sqrt(var + 1e-5) * trained["bn.weight"] + trained["bn.bias"]
    act = jax.nn.gelu(bn, approximate=False)
    pooled = jnp.mean(act, (1, 2)) @ state["frozen.weight"]
    hidden = jax.nn.gelu(pooled @ trained["hidden.weight"] + trained["hidden.bias"], approximate=False)
    centred = hidden - hidden.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + shared.NORM_EPS)
    norm = centred * scale * trained["norm.weight"] + trained["norm.bias"]
    output = norm @ trained["head.weight"] + trained["head.bias"]
    points = (*(jnp.transpose(p, (0, 3, 1, 2)) for p in (conv, bn, act)), pooled, hidden, norm, output)
    return output, dict(zip(POINTS, points, strict=True)), statistics


def loss(trained, state, images, targets):
    """The sum of squares, divided by the elements of the whole batch; points and statistics come along."""
    output, points, statistics = forward(trained, state, images)
    aim = targets + 0.1 * jax.lax.stop_gradient(points["norm"]) @ state["target.weight"]
    total = jnp.sum((output - aim) ** 2)
    return total / (shared.EXAMPLES * 4), (total, points, statistics)


GRADIENTS = jax.jit(jax.value_and_grad(loss, has_aux=True))


def direction(name: str) -> optax.GradientTransformation:
    """What the rate is multiplied by."""
    decay = optax.add_decayed_weights(
        shared.DECAY, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    )
    return {
        "sgd": optax.identity(),
        "momentum": optax.trace(0.875),
        "adamw": optax.chain(optax.scale_by_adam(*shared.BETAS, shared.EPS), decay),
        "adamw_bf16": optax.chain(
            optax.scale_by_adam(*shared.BETAS, shared.EPS, mu_dtype=jnp.bfloat16), decay
        ),
        "muon": optax.partition(
            {"muon": muon(), "adam": optax.scale_by_adam(*shared.BETAS, shared.EPS)}, labels
        ),
        "lion": optax.chain(optax.scale_by_lion(*shared.BETAS), decay),
        "adafactor": optax.chain(
            optax.scale_by_factored_rms(decay_rate=1.0, min_dim_size_to_factor=8),
            optax.clip_by_block_rms(1.0),
        ),
    }[name]


def labels(tree) -> dict:
    """Muon is for matrices; a convolution's kernel and all else go to Adam."""
    return jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", tree)


def muon() -> optax.GradientTransformation:
    """What optax.contrib.muon is made of, without the rate."""

    def matrices(tree):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=shared.MUON_BETA, eps=shared.MUON_EPS, weight_dimension_numbers=matrices
        ),
        optax.stateless_with_tree_map(lambda x, _: x * max(1.0, x.shape[1] / x.shape[0]) ** 0.5),
        optax.add_decayed_weights(shared.DECAY),
    )


def slots(name: str, state) -> dict:
    """The optimizer's state by slot; what a factored weight does not use is left out."""
    match name:
        case "sgd":
            return {}
        case "momentum":
            return {"momentum": state.trace}
        case "muon":
            inner = {rule: each.inner_state for rule, each in state.inner_states.items()}
            trees = {
                "momentum": inner["muon"][0].mu,
                "moment1": inner["adam"].mu,
                "moment2": inner["adam"].nu,
            }
            return {
                slot: {n: a for n, a in tree.items() if isinstance(a, jax.Array)}
                for slot, tree in trees.items()
            }
        case "adamw" | "adamw_bf16":
            return {"moment1": state[0].mu, "moment2": state[0].nu}
        case "lion":
            return {"momentum": state[0].mu}
        case _:
            used = {slot: getattr(state[0], slot) for slot in ("v_row", "v_col", "v")}
            return {slot: {n: a for n, a in tree.items() if a.size > 1} for slot, tree in used.items()}


def train(home: Path, dtype: str, name: str) -> None:
    """Train and record."""
    start = shared.starting_weights(dtype)
    own = {n: a.T if n in KERNELS else a for n, a in start.items()}
    own["conv.weight"] = start["conv.weight"].transpose(2, 3, 1, 0)
    recorder = Recorder(
        home / f"jax-{name}-{dtype}", names={n: n for n in start}, transpose=KERNELS,
        permute={"conv.weight": (3, 2, 0, 1)},
    )  # fmt: skip
    recorder.initial(own)
    trained = {n: jnp.asarray(own[n]) for n in shared.TRAINED}
    state = {n: jnp.asarray(a) for n, a in own.items() if n not in trained}
    optimizer = direction(name)
    moments = optimizer.init(trained)
    for step in range(1, shared.STEPS + 1):
        data, gradients, losses, points = shared.batch(step, dtype), None, 0.0, []
        for part in np.split(np.arange(shared.EXAMPLES), shared.SLICES):
            (_, (total, seen, statistics)), each = GRADIENTS(
                trained, state, *(a[part] for a in data.values())
            )
            gradients = each if gradients is None else jax.tree.map(jnp.add, gradients, each)
            losses, state = losses + total.item(), state | statistics
            points.append(seen)
        norm = optax.global_norm(gradients)
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, shared.CLIP / (norm + 1e-6)), gradients)  # noqa: B023
        steps, moments = optimizer.update(clipped, moments, trained)
        lr = shared.rate(step)
        trained = jax.tree.map(lambda w, u: w - lr * u, trained, steps)  # noqa: B023
        target = (1 - shared.TAU) * state["target.weight"] + shared.TAU * trained["head.weight"]
        state["target.weight"] = target
        recorder.step(
            batch=data, loss_sum=losses, tokens=shared.EXAMPLES * 4, lr=lr, gradients=gradients,
            weights=trained | state, slots=slots(name, moments), grad_norm=norm.item(),
            activations={p: np.concatenate([seen[p] for seen in points]) for p in POINTS},
        )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", sys.argv[2] == "float64")
    for case in sys.argv[3:]:
        train(Path(sys.argv[1]), sys.argv[2], case)
