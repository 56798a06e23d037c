"""A decoder of any family: embedding, a scan of one block over the stacked layers, final norm, head.

B batch, S sequence, N virtual tokens of a prompt, T = N + S positions, E embed, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from jaxtrain.activations import IN_LAYERS, NO_PROBES, Probes, recording, tap
from jaxtrain.attention.visible import Visible
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import (
    Build,
    Encoder,
    VirtualTokens,
    in_front,
    repeated,
    rotary_tables,
)
from jaxtrain.weights import is_stacked
from trainspec.model import ModelSpec


class Decoder(nnx.Module):
    """Token ids [B, S], positions and segments [B, T] to logits [B, T, vocab].

    A family's class makes the weights, among them `layers`, the stack of blocks, and computes what is not in a block.
    """

    layers: Any

    def __init__(self, spec: ModelSpec, *, remat: str, build: Build) -> None:
        self.spec, self.remat, self.build = spec, remat, build
        self.prompt_encoder: Encoder | None = None
        # How many virtual tokens stand at the beginning of a row.
        self.prompt_tokens = 0
        # Whether a prefix has positions before those of the tokens, and leaves a window.
        self.prefix_is_before = True

    def look_up(self, input_ids: Array) -> Array:
        """The embeddings [B, S, E] of token ids."""
        raise NotImplementedError

    def drop_prefix(self, dropout: nnx.Module) -> str:
        """Let every layer's attention take a prefix through `dropout`; returns its path in the model."""
        raise NotImplementedError

    def normed(self, x_BSE: Array) -> Array:
        """The final norm of the residual stream."""
        raise NotImplementedError

    def projected(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        """The head's logits [B, T, vocab] of the normed residual stream."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None = None,
        probes: Probes = NO_PROBES,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and the activations that `probes` asks for, those of layers with the layers in front."""
        virtual = self.virtual(None if point is None else point.step)
        with recording(probes) as recorded:
            x_BSE = self.embed(input_ids, virtual)
            x_BSE, in_layers = self.blocks(
                x_BSE,
                virtual,
                positions=positions,
                segments=segments,
                point=point,
                probes=probes,
                is_rotated=rotated_layers(self.spec, range(self.spec.layers)),
            )
            logits = self.head(x_BSE, point)
        return logits, recorded | in_layers

    def virtual(self, step: Array | None) -> VirtualTokens:
        """The virtual tokens of update `step`, the same for every example; None is without dropout."""
        return VirtualTokens() if self.prompt_encoder is None else self.prompt_encoder(step)

    def embed(self, input_ids: Array, virtual: VirtualTokens) -> Array:
        """The first layer's input [B, T, E]."""
        x_BSE = self.look_up(input_ids)
        if virtual.prompt is not None:
            x_BSE = in_front(tap("prompt", repeated(virtual.prompt, x_BSE)), x_BSE)
        return tap("embedding", x_BSE)

    def blocks(
        self,
        x_BSE: Array,
        virtual: VirtualTokens,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None,
        probes: Probes,
        is_layer: Array | None = None,
        is_rotated: Array | NDArray[np.bool_] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The residual stream after all layers of the stack, and the activations recorded in each.

        `is_layer` [L] is given for a stack with empty slots, and false for those: they leave x as it is. `is_rotated` [L]
        is given where some layers do not rotate queries and keys, and false for those.
        """
        cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)
        visible = Visible(
            segments_BS=segments,
            positions_BS=positions,
            prompt=self.prompt_tokens,
            prefix=0 if virtual.prefix is None else virtual.prefix.shape[1],
            window=self.spec.window,
            prefix_has_positions=self.prefix_is_before,
            is_recorded=probes is None or len(probes) > 0,
        )
        definition, stacked = nnx.split(self.layers)

        def block(
            x_BSE: Array, layer: tuple[nnx.State, Probes, Array | None, Array | NDArray[np.bool_] | None]
        ) -> tuple[Array, dict[str, Array]]:
            weights, layer_probes, prefix, rotated = layer
            own_cos, own_sin = (cos, sin) if rotated is None else turning(rotated, cos, sin)
            with recording(layer_probes, prefix=IN_LAYERS) as recorded:
                x_BSE = nnx.merge(definition, weights)(x_BSE, own_cos, own_sin, visible, point, prefix)
            return x_BSE, recorded

        if self.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)

        def slot(x_BSE: Array, layer_in_slot: tuple[Any, Array]) -> tuple[Array, dict[str, Array]]:
            layer, is_layer = layer_in_slot
            y_BSE, recorded = block(x_BSE, layer)
            return jnp.where(is_layer, y_BSE, x_BSE), recorded

        if probes is not None:
            probes = {name: probe for name, probe in probes.items() if is_stacked(name)}
        layers = (stacked, probes, virtual.prefix, is_rotated)
        if is_layer is None:
            return lax.scan(block, x_BSE, layers)
        return lax.scan(slot, x_BSE, (layers, is_layer))

    def head(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        """Logits [B, T, vocab] from the last layer's output."""
        x_BSE = tap("norm", self.normed(x_BSE))
        return tap("logits", self.projected(x_BSE, point))


def rotated_layers(spec: ModelSpec, order: Iterable[int | None]) -> NDArray[np.bool_] | None:
    """Whether the layer in each slot of a stack rotates queries and keys; None where all of them do."""
    return np.array([layer not in spec.unrotated for layer in order]) if spec.unrotated else None


def turning(rotated: Array | NDArray[np.bool_], cos: Array, sin: Array) -> tuple[Array, Array]:
    """The tables where `rotated`, or else those of the angle 0, which turn nothing."""
    return jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
