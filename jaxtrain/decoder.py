"""A decoder of any family: embedding, one block stacked over the layers and scanned, final norm, head.

B batch, S sequence, E embed, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.activations import Probes, Tap
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import Build, Encoder, VirtualTokens, attention_mask, in_front, rotary_tables
from trainspec.model import ModelSpec
from trainspec.trace import LAYER_POINTS


class Decoder(nnx.Module):
    """Token ids [B, S], positions and segments [B, rows of the sequence] to logits [B, rows, vocab].

    A family's class makes the weights, among them `layers`, the stack of blocks, and says what is done at both ends.
    """

    layers: Any

    def __init__(self, spec: ModelSpec, *, remat: str, build: Build) -> None:
        self.spec, self.remat, self.build = spec, remat, build
        self.prompt_encoder: Encoder | None = None

    def look_up(self, input_ids: Array) -> Array:
        """The embeddings [B, S, E] of tokens."""
        raise NotImplementedError

    def normed(self, x_BSE: Array) -> Array:
        """What the final norm makes of the residual stream."""
        raise NotImplementedError

    def projected(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        """The head's logits [B, S, vocab]."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None = None,
        probes: Probes | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and the activations [.., B, rows, ..] at the points that `probes` has (layers in front)."""
        tap, virtual = Tap(probes or {}), self.virtual(None if point is None else point.step)
        x_BSE = self.embed(input_ids, virtual, tap)
        x_BSE, seen = self.blocks(
            x_BSE,
            virtual,
            positions=positions,
            segments=segments,
            point=point,
            probes=probes or {},
        )
        return self.head(x_BSE, point, tap), seen | tap.seen

    def virtual(self, step: Array | None) -> VirtualTokens:
        """The virtual tokens of update `step`, which are the same for every example."""
        return VirtualTokens() if self.prompt_encoder is None else self.prompt_encoder(step)

    def embed(self, input_ids: Array, virtual: VirtualTokens, tap: Tap) -> Array:
        """What the first layer is given, [B, rows, E]."""
        x_BSE = self.look_up(input_ids)
        if virtual.rows is not None:
            x_BSE = in_front(virtual.rows, x_BSE)
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
    ) -> tuple[Array, dict[str, Array]]:
        """The stacked layers one after the other, and what was seen in each.

        Where the stack is filled up, `is_layer` [L] says which of it are layers: the others let x pass.
        """
        cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)
        mask_BSS = attention_mask(segments)
        if virtual.prefix is not None:
            seen_by_all = ((0, 0), (0, 0), (virtual.prefix.shape[1], 0))
            mask_BSS = jnp.pad(mask_BSS, seen_by_all, constant_values=True)
        definition, stacked = nnx.split(self.layers)

        def block(
            x_BSE: Array, layer: tuple[nnx.State, Probes, Array | None]
        ) -> tuple[Array, dict[str, Array]]:
            weights, layer_probes, prefix = layer
            inner_tap = Tap(layer_probes)
            x_BSE = nnx.merge(definition, weights)(x_BSE, cos, sin, mask_BSS, point, prefix, inner_tap)
            return x_BSE, inner_tap.seen

        if self.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)

        def place(x_BSE: Array, filled: tuple[Any, Array]) -> tuple[Array, dict[str, Array]]:
            layer, is_layer = filled
            y_BSE, seen = block(x_BSE, layer)
            return jnp.where(is_layer, y_BSE, x_BSE), seen

        layer_probes = {name: probe for name, probe in probes.items() if name in LAYER_POINTS}
        layers = (stacked, layer_probes, virtual.prefix)
        if is_layer is None:
            return lax.scan(block, x_BSE, layers)
        return lax.scan(place, x_BSE, (layers, is_layer))

    def head(self, x_BSE: Array, point: DropoutPoint | None, tap: Tap) -> Array:
        """Logits [B, S, vocab] of what the last layer gives."""
        x_BSE = tap("norm", self.normed(x_BSE))
        return tap("logits", self.projected(x_BSE, point))
