"""P-tuning: an MLP or an LSTM makes embeddings that are put before those of the tokens.

N virtual tokens, E embed, I input width and H hidden width of an LSTM layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutKey, dropped
from jaxtrain.layers import Build, VirtualTokens, abstract
from jaxtrain.methods.site import Site
from jaxtrain.methods.virtual_tokens import linear_layers
from jaxtrain.rounding import Sums, in_sums, rounded
from jaxtrain.weight_ops import matmul_transposed, read, shift
from trainspec.methods import ENCODER, PTuning
from trainspec.model import ModelSpec
from trainspec.rng import name_key


def attach(model: Decoder, method: PTuning, site: Site) -> dict[str, np.ndarray]:
    """Let `model` put the encoder's prompt before its embeddings; returns the LSTM's dropout key."""
    encoder = PromptEncoder(site.spec, method, build=model.build)
    model.prompt_tokens = method.virtual_tokens
    model.prompt_encoder = nnx.data(encoder)
    if encoder.lstm_head is None:
        return {}
    name = f"{ENCODER}.lstm_head"
    return {f"{name}.dropout_key": np.array(name_key(site.seed, "dropout", name), np.uint32)}


class PromptEncoder(nnx.Module):
    """An MLP, or an LSTM and an MLP, over trained embeddings (PEFT's PromptEncoder)."""

    def __init__(self, spec: ModelSpec, method: PTuning, *, build: Build) -> None:
        self.embedding = abstract((method.virtual_tokens, spec.embed), build.dtype)
        self.dtype, self.constrain = build.dtype, build.constrain
        H = method.hidden or spec.embed
        if method.encoder == "mlp":
            self.lstm_head = None
            self.mlp_head = linear_layers(spec.embed, H, H, spec.embed, build=build)
        else:
            self.lstm_head = LSTM(spec.embed, H, rate=method.dropout, build=build)
            self.mlp_head = linear_layers(2 * H, 2 * H, spec.embed, build=build)

    def __call__(self, step: Array | None) -> VirtualTokens:
        """A prompt [N, E]."""
        x = embedded = read(self.embedding.get_value())
        if self.lstm_head is not None:
            x = self.lstm_head(x, step)
        *inner, last = self.mlp_head.values()
        for layer in inner:
            x = jax.nn.relu(layer(x, None).astype(self.dtype))
        x = last(x, None).astype(embedded.dtype)
        return VirtualTokens(prompt=self.constrain(x, ("virtual", "embed")))


class LSTM(nnx.Module):
    """torch.nn.LSTM with two bidirectional layers and dropout between them, from the shared generator."""

    def __init__(self, in_size: int, hidden: int, *, rate: float, build: Build) -> None:
        self.l0, self.l0_reverse = (Recurrence(in_size, hidden, build=build) for _ in range(2))
        self.l1, self.l1_reverse = (Recurrence(2 * hidden, hidden, build=build) for _ in range(2))
        self.dropout_key = DropoutKey(jax.ShapeDtypeStruct((2,), jnp.uint32))
        self.rate = rate

    def __call__(self, x_NI: Array, step: Array | None) -> Array:
        """Hidden states [N, 2 H] of the last layer."""
        x_NI = jnp.concatenate([self.l0(x_NI), self.l0_reverse(x_NI[::-1])[::-1]], axis=-1)
        if step is not None and self.rate > 0:
            # Virtual tokens belong to no example: the mask is that of row 0.
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
        tokens, gate_size = given.shape
        # Gathered once: `matmul` would gather it for every token.
        weight_hh = in_sums(read(self.weight_hh.get_value()), Sums(back_total=tokens))

        def token(before: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
            hidden, cell = before
            factor = in_sums(hidden, Sums(factor=self.hidden, back_total=gate_size))
            sums = Sums(total=self.hidden, back_factor=max(gate_size, tokens))
            gates = rounded(given + rounded(weight_hh.astype(self.dtype) @ factor, sums=sums))
            i, f, g, o = jnp.split(gates, 4)
            cell = rounded(jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g))
            hidden = rounded(jax.nn.sigmoid(o) * jnp.tanh(cell))
            return (hidden, cell), hidden

        nothing = jnp.zeros(self.hidden, self.dtype)
        return lax.scan(token, (nothing, nothing), given)[1]
