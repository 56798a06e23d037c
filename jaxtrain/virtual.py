"""Virtual tokens: the encoders that make them, and how a batch looks with them.

An encoder is whole on every device and runs once for a pass, as it knows no example. What it gives has the type that
gradients are summed in: the sum over examples and microbatches is made in that, and is rounded once on its way back. So
has the trained embedding that it begins with: the gradient of that is not rounded at all.

N virtual tokens, I and H widths of an encoder, L places of the stack of layers, K kv heads, D head dim.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutKey, dropped
from jaxtrain.layers import VIRTUAL, Build, Dim, Linear, VirtualTokens, abstract
from jaxtrain.optim import Weights
from jaxtrain.tensor import matmul_transposed, read, shift
from jaxtrain.weights import Order
from trainspec.data import IGNORED
from trainspec.methods import (
    ENCODER,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    leading_rows,
    virtual_tokens,
)
from trainspec.model import ModelSpec
from trainspec.rng import name_key


def all_rows(batch: Weights, method: Method) -> Weights:
    """A batch [..., S] as it is for the layers, with rows [..., N + S] where a prompt stands in front; ids stay S."""
    return batch | {
        "positions": all_positions(batch["positions"], method),
        "segments": all_segments(batch["segments"], method),
        "labels": all_labels(batch["labels"], method),
    }


def all_positions(positions: Array, method: Method) -> Array:
    """Positions of a layer's rows, from those of the tokens in their documents."""
    moved = positions + virtual_tokens(method)
    return _with_leading(jnp.arange(leading_rows(method)), moved)


def all_labels(labels: Array, method: Method) -> Array:
    """Labels of a layer's rows: a virtual token is nobody's target."""
    return _with_leading(jnp.full(leading_rows(method), IGNORED), labels)


def all_segments(segments: Array, method: Method) -> Array:
    """Segments of a layer's rows: the virtual ones have one of their own, which all documents see."""
    return _with_leading(jnp.full(leading_rows(method), VIRTUAL), segments)


def _with_leading(row_N: Array, x: Array) -> Array:
    repeated = jnp.broadcast_to(row_N.astype(x.dtype), (*x.shape[:-1], len(row_N)))
    return jnp.concatenate([repeated, x], axis=-1)


def attach_prompt(
    model: Decoder, spec: ModelSpec, method: PromptTuning | PTuning, *, seed: int
) -> dict[str, np.ndarray]:
    """Let `model` put the encoder's rows in front of what it embeds; returns the constants of its dropout, if any."""
    encoder = PromptEncoder(spec, method, build=model.build)
    model.prompt_encoder = nnx.data(encoder)
    if encoder.lstm_head is None:
        return {}
    name = f"{ENCODER}.lstm_head"
    return {f"{name}.dropout_key": np.array(name_key(seed, "dropout", name), np.uint32)}


def attach_prefix(model: Decoder, spec: ModelSpec, method: PrefixTuning, *, order: Order) -> None:
    """Give every layer's attention the encoder's keys and values, those of a stack in `order`."""
    model.prompt_encoder = nnx.data(PrefixEncoder(spec, method, order=order, build=model.build))


class PromptEncoder(nnx.Module):
    """The rows of a prompt: trained ones, or what P-tuning's MLP or LSTM makes of them (PEFT's PromptEncoder)."""

    def __init__(self, spec: ModelSpec, method: PromptTuning | PTuning, *, build: Build) -> None:
        self.embedding = abstract((method.virtual_tokens, spec.embed), build.dtype)
        self.dtype, self.constrain = build.dtype, build.constrain
        lstm_head, mlp_head = None, None
        if isinstance(method, PTuning):
            H = method.hidden or spec.embed
            if method.encoder == "mlp":
                mlp_head = _layers(spec.embed, H, H, spec.embed, build=build)
            else:
                lstm_head = LSTM(spec.embed, H, rate=method.dropout, build=build)
                mlp_head = _layers(2 * H, 2 * H, spec.embed, build=build)
        self.lstm_head, self.mlp_head = lstm_head, mlp_head

    def __call__(self, step: Array | None) -> VirtualTokens:
        """Rows [N, E]."""
        x = embedded = read(self.embedding.get_value())
        if self.lstm_head is not None:
            x = self.lstm_head(x, step)
        if self.mlp_head is not None:
            *inner, last = self.mlp_head.values()
            for layer in inner:
                x = jax.nn.relu(layer(x, None).astype(self.dtype))
            x = last(x, None).astype(embedded.dtype)
        return VirtualTokens(rows=self.constrain(x, ("virtual", "embed")))


class PrefixEncoder(nnx.Module):
    """Keys and values in front of each layer's own, PEFT's PrefixEncoder: trained, or projected from what is trained.

    Its output [N, 2 L K D] is, of each virtual token, every layer's key and value; stacked in `order`.
    """

    def __init__(self, spec: ModelSpec, method: PrefixTuning, *, order: Order, build: Build) -> None:
        self.shape = (method.virtual_tokens, spec.layers, 2, spec.kv_heads, spec.head_dim)
        # A place without a layer lets everything pass: the keys and values of any will do.
        self.order = tuple(layer or 0 for layer in order)
        self.dtype, self.constrain = build.dtype, build.constrain
        width, whole = spec.kv_heads * spec.head_dim, int(np.prod(self.shape[1:]))
        self.embedding = abstract((self.shape[0], width if method.projection else whole), build.dtype)
        layers = (width, method.hidden or width, whole)
        self.transform = _layers(*layers, build=build) if method.projection else None

    def __call__(self, step: Array | None) -> VirtualTokens:
        """A prefix [L, N, 2, K, D], L places."""
        made = read(self.embedding.get_value())
        if self.transform is not None:
            first, last = self.transform.values()
            inner = jnp.tanh(first(made, None).astype(self.dtype))
            made = last(inner, None).astype(made.dtype)
        prefix_LN2KD = jnp.moveaxis(made.reshape(self.shape), 1, 0)[np.array(self.order)]
        return VirtualTokens(prefix=self.constrain(prefix_LN2KD, PREFIX_AXES))


# Of the keys and values of all layers.
PREFIX_AXES = ("stage", "virtual", "pair", "kv_heads", "dim")


def _layers(*sizes: int, build: Build) -> nnx.Dict[Linear]:
    """Linear layers by their numbers in a torch.nn.Sequential that has a non-linearity behind each but the last."""

    def constrain(x: Array, axes: tuple[str, ...]) -> Array:
        return build.constrain(x, ("virtual", "hidden"))

    whole = build._replace(constrain=constrain)
    dims = [Dim("hidden", size) for size in sizes]
    return nnx.Dict(
        {
            str(2 * i): Linear(inner, outer, bias=True, stack=(), build=whole)
            for i, (inner, outer) in enumerate(pairwise(dims))
        }
    )


class LSTM(nnx.Module):
    """torch.nn.LSTM, two layers of both directions; dropout between them, from the shared generator."""

    def __init__(self, in_size: int, hidden: int, *, rate: float, build: Build) -> None:
        self.l0, self.l0_reverse = (Recurrence(in_size, hidden, build=build) for _ in range(2))
        self.l1, self.l1_reverse = (Recurrence(2 * hidden, hidden, build=build) for _ in range(2))
        self.dropout_key = DropoutKey(jax.ShapeDtypeStruct((2,), jnp.uint32))
        self.rate = rate

    def __call__(self, x_NI: Array, step: Array | None) -> Array:
        """Hidden states [N, 2 H] of the last layer."""
        x_NI = jnp.concatenate([self.l0(x_NI), self.l0_reverse(x_NI[::-1])[::-1]], axis=-1)
        if step is not None and self.rate > 0:
            # Virtual tokens belong to no row of the batch: the mask is that of row 0.
            row = jnp.zeros(1, jnp.int32)
            x_NI = dropped(x_NI[None], self.dropout_key[...], step=step, rows=row, rate=self.rate)[0]
        return jnp.concatenate([self.l1(x_NI), self.l1_reverse(x_NI[::-1])[::-1]], axis=-1)


class Recurrence(nnx.Module):
    """One direction of one layer of an LSTM; gates in torch's order: input, forget, cell, output."""

    def __init__(self, in_size: int, hidden: int, *, build: Build) -> None:
        self.weight_ih = abstract((4 * hidden, in_size), build.dtype)
        self.weight_hh = abstract((4 * hidden, hidden), build.dtype)
        self.bias_ih = abstract((4 * hidden,), build.dtype)
        self.bias_hh = abstract((4 * hidden,), build.dtype)
        self.hidden, self.dtype, self.constrain = hidden, build.dtype, build.constrain

    def __call__(self, x_NI: Array) -> Array:
        """Hidden states [N, H]."""
        given = shift(matmul_transposed(x_NI, self.weight_ih.get_value()), self.bias_ih.get_value())
        given = shift(given.astype(self.dtype), self.bias_hh.get_value())
        given = self.constrain(given, ("virtual", "hidden"))
        # Whole for all tokens: a product with it in the loop would gather it for each.
        of_state = read(self.weight_hh.get_value())

        def token(before: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
            hidden, cell = before
            gates = given + of_state.astype(self.dtype) @ hidden
            i, f, g, o = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        nothing = jnp.zeros(self.hidden, self.dtype)
        return lax.scan(token, (nothing, nothing), given)[1]
