"""A small language model in plain JAX and optax that records its trace. Its twin is twin_lm_torch.py; see docs/record-a-trace.md.

python docs/examples/twin_lm_jax.py runs/lm/jax
"""

from argparse import ArgumentParser

import jax
import jax.numpy as jnp
import numpy as np
import optax
import twin_lm_data as shared

from parity import Recorder

Weights = dict[str, jax.Array]


def layer_norm(w: Weights, name: str, x: jax.Array) -> jax.Array:
    """With torch's eps of 1e-5; flax has 1e-6."""
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention; jax.nn.dot_product_attention has its softmax in float32, whatever it is given."""
    scores = jnp.einsum("etnd,esnd->ents", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("ents,esnd->etnd", jax.nn.softmax(scores), v)


def layer(w: Weights, i: str, x: jax.Array) -> jax.Array:
    """Attention and a multilayer perceptron, each added to the residual stream."""
    normed = layer_norm(w, f"{i}.norm1", x)
    q, k, v = (
        (normed @ w[f"{i}.{part}.weight"]).reshape(*x.shape[:2], shared.HEADS, -1) for part in ("q", "k", "v")
    )
    x = x + attend(q, k, v).reshape(x.shape) @ w[f"{i}.out.weight"]
    up = layer_norm(w, f"{i}.norm2", x) @ w[f"{i}.up.weight"] + w[f"{i}.up.bias"]
    return x + jax.nn.gelu(up, approximate=False) @ w[f"{i}.down.weight"] + w[f"{i}.down.bias"]


@jax.value_and_grad
def loss_sum_and_gradients(w: Weights, ids: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum over the target tokens of a slice."""
    x = w["tokens.weight"][ids] + w["positions.weight"]
    for i in range(shared.LAYERS):
        x = layer(w, f"layers.{i}", x)
    logits = layer_norm(w, "norm", x) @ w["head.weight"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels == shared.IGNORED, 0.0, losses))


def schedule(count: jax.Array) -> jax.Array:
    """The rate; optax counts in int32, and what is divided in that type is float32, under x64, too."""
    return shared.LR * jnp.minimum(1.0, (count.astype(jnp.float64) + 1) / shared.WARMUP)


def main() -> None:
    """Train and record."""
    parser = ArgumentParser()
    parser.add_argument("trace", help="where the trace goes")
    parser.add_argument("--decay-all", action="store_true", help="a mistake: norms and biases decay, too")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    weights = {}
    for name, array in shared.starting_weights().items():
        parts = np.split(array, 3) if "qkv" in name else [array]
        names = [name.replace("qkv", part) for part in "qkv"] if "qkv" in name else [name]
        weights |= dict(zip(names, parts, strict=True))
    kernels = [n for n, a in weights.items() if a.ndim == 2 and n.startswith(("layers", "head"))]
    weights = {n: jnp.asarray(array.T if n in kernels else array) for n, array in weights.items()}
    mask = {name: array.ndim > 1 or args.decay_all for name, array in weights.items()}
    optimizer = optax.adamw(schedule, weight_decay=shared.DECAY, mask=mask)
    state = optimizer.init(weights)

    same = {name: name for name in weights}
    recorder = Recorder(args.trace, names=same, transpose=kernels, program="twin_lm_jax", precision="fp64")
    recorder.initial(weights)
    for step in range(shared.STEPS):
        data = shared.batch(step)
        tokens = int((data["labels"] != shared.IGNORED).sum())
        slices = zip(*(np.split(array, shared.SLICES) for array in data.values()), strict=True)
        losses, parts = zip(*(loss_sum_and_gradients(weights, *each) for each in slices), strict=True)
        gradients = jax.tree.map(lambda *each: sum(each) / tokens, *parts)  # noqa: B023
        # torch's clip_grad_norm_ adds 1e-6 to the norm, optax.clip_by_global_norm does not.
        norm = optax.global_norm(gradients)
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, shared.CLIP / (norm + 1e-6)), gradients)  # noqa: B023
        updates, state = optimizer.update(clipped, state, weights)
        weights = optax.apply_updates(weights, updates)
        recorder.step(
            batch=data, loss_sum=float(sum(losses)), tokens=tokens, lr=schedule(jnp.int32(step)).item(), gradients=gradients,
            weights=weights, moment1=state[0].mu, moment2=state[0].nu, grad_norm=norm.item(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
