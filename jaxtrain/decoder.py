"""A decoder of any family: embedding, a scan of one block over the stacked layers, final norm, head.

B batch, S sequence, N virtual tokens of a prompt, T = N + S positions, E embed, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from jaxtrain.activations import IN_LAYERS, NO_PROBES, Probes, recording, tap
from jaxtrain.attention.one_token import OneToken
from jaxtrain.attention.visible import Visible
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import (
    Build,
    Embedding,
    Encoder,
    KeysValues,
    Linear,
    VirtualTokens,
    in_front,
    project,
    repeated,
    rotary_tables,
)
from jaxtrain.weights import is_stacked
from trainspec.model import ModelSpec

# The least width and the most layers of a model whose blocks a program for a CPU has one after the other.
UNROLLED_WIDTH, UNROLLED_LAYERS = 512, 32
# Keys [B, K, D, T] and values [B, K, T, D] of all layers, with the layers in front or apart.
Kept = KeysValues | list[KeysValues]


class Decoder(nnx.Module):
    """Token ids [B, S], positions and segments [B, T] to logits [B, T, vocab].

    A family's class makes the weights, among them `layers`, the stack of blocks, and computes what is not in a block.
    """

    layers: Any

    def __init__(self, spec: ModelSpec, *, remat: str, build: Build) -> None:
        self.spec, self.remat, self.build = spec, remat, build
        # Whether the blocks stand one after the other in a program, and not in a loop: `is_worth_unrolling`.
        self.unrolls = False
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

    def head_layer(self) -> Embedding | Linear:
        """The layer that makes logits of the normed residual stream."""
        raise NotImplementedError

    def projected(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        """The head's logits [B, T, vocab] of the normed residual stream."""
        return project(self.head_layer(), x_BSE, point)

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array,
        segments: Array,
        point: DropoutPoint | None = None,
        probes: Probes = NO_PROBES,
        end: Callable[[Array], Any] | None = None,
    ) -> tuple[Any, dict[str, Array]]:
        """Logits, and the activations that `probes` asks for, those of layers with the layers in front.

        `end` makes something else of the last layer's output than logits.
        """
        virtual = self.virtual(None if point is None else point.step)
        with recording(probes) as recorded:
            x_BSE = self.embed(input_ids, virtual)
            x_BSE, in_layers, _ = self.blocks(
                x_BSE,
                virtual,
                positions=positions,
                segments=segments,
                point=point,
                probes=probes,
                is_rotated=rotated_layers(self.spec, range(self.spec.layers)),
            )
            made = self.head(x_BSE, point) if end is None else end(x_BSE)
        return made, recorded | in_layers

    def begin(
        self, input_ids: Array, *, positions: Array, segments: Array, end: Callable[[Array], Array]
    ) -> tuple[Array, KeysValues]:
        """What `end` makes of the last layer's output, and the keys and values [L, B, P + T, K, D] of all layers.

        They are those that attention saw: rotated, and after those of a prefix of P.
        """
        virtual = self.virtual(None)
        x_BSE, _, seen = self.blocks(
            self.embed(input_ids, virtual),
            virtual,
            positions=positions,
            segments=segments,
            point=None,
            probes=NO_PROBES,
            is_rotated=rotated_layers(self.spec, range(self.spec.layers)),
            keeps_seen=True,
        )
        assert seen is not None
        return end(x_BSE), seen

    def extend(
        self, ids_B: Array, places_B: Array, kept: Kept, *, prefix: int, positions: Array, segments: Array
    ) -> tuple[Array, Kept]:
        """The logits [B, vocab] after one more token of each row, and what is kept with its keys and values.

        `places_B` are the tokens' places in rows with these positions and segments [B, T], of which `kept` has the P + T keys and
        values, those of a prefix of P first. If it has each layer's apart, so have the weights.
        """
        places_B1 = places_B[:, None]
        seen_BT = self.visible(positions, segments, prefix=prefix).mask(places_B1)[:, 0]
        x_B1E = self.look_up(ids_B[:, None])
        own_positions = jnp.take_along_axis(positions, places_B1, axis=1, mode="clip")
        cos, sin = rotary_tables(self.spec, own_positions, x_B1E.dtype)
        definition, stacked = nnx.split(self.layers)
        is_rotated = rotated_layers(self.spec, range(self.spec.layers))

        def block(
            x_B1E: Array, weights: nnx.State, kept: KeysValues, rotated: Any
        ) -> tuple[Array, KeysValues]:
            own_cos, own_sin = (cos, sin) if rotated is None else turning(rotated, cos, sin)
            visible = OneToken(kept, seen_BT, prefix + places_B)
            return nnx.merge(definition, weights)(x_B1E, own_cos, own_sin, visible, None, None)

        def in_stack(carry: tuple[Array, KeysValues], layer: Any) -> tuple[tuple[Array, KeysValues], None]:
            x_B1E, kept = carry
            i, weights, rotated = layer
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), kept)
            x_B1E, own = block(x_B1E, weights, own, rotated)
            kept = jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), kept, own)
            return (x_B1E, kept), None

        if isinstance(kept, KeysValues):
            layers = (jnp.arange(self.spec.layers), stacked, is_rotated)
            (x_B1E, kept), _ = lax.scan(in_stack, (x_B1E, kept), layers)
            return self.head(x_B1E, None)[:, 0], kept
        apart: list[KeysValues] = []
        for i, own in enumerate(kept):
            weights, rotated = jax.tree.map(lambda w, i=i: w[i], (stacked, is_rotated), is_leaf=is_apart)
            x_B1E, own = block(x_B1E, weights, own, rotated)
            apart.append(own)
        return self.head(x_B1E, None)[:, 0], apart

    def visible(
        self, positions: Array, segments: Array, *, prefix: int, is_recorded: bool = False
    ) -> Visible:
        """What queries of rows with these positions and segments see, after a prefix of so many keys."""
        return Visible(
            segments_BS=segments,
            positions_BS=positions,
            prompt=self.prompt_tokens,
            prefix=prefix,
            window=self.spec.window,
            prefix_has_positions=self.prefix_is_before,
            is_recorded=is_recorded,
        )

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
        keeps_seen: bool = False,
    ) -> tuple[Array, dict[str, Array], KeysValues | None]:
        """The residual stream after all layers of the stack, and the activations recorded in each.

        With `keeps_seen` also the keys and values that attention saw in each. `is_layer` [L] is given for a stack with empty
        slots, and false for those: they leave x as it is. `is_rotated` [L] is given where some layers do not rotate queries and
        keys, and false for those.
        """
        cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)
        visible = self.visible(
            positions,
            segments,
            prefix=0 if virtual.prefix is None else virtual.prefix.shape[1],
            is_recorded=probes is None or len(probes) > 0,
        )
        definition, stacked = nnx.split(self.layers)

        def block(
            x_BSE: Array, layer: tuple[nnx.State, Probes, Array | None, Array | NDArray[np.bool_] | None]
        ) -> tuple[Array, tuple[dict[str, Array], KeysValues | None]]:
            weights, layer_probes, prefix, rotated = layer
            own_cos, own_sin = (cos, sin) if rotated is None else turning(rotated, cos, sin)
            with recording(layer_probes, prefix=IN_LAYERS) as recorded:
                x_BSE, seen = nnx.merge(definition, weights)(x_BSE, own_cos, own_sin, visible, point, prefix)
            return x_BSE, (recorded, seen if keeps_seen else None)

        if self.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)  # which holds in a loop alone

        def slot(x_BSE: Array, layer_in_slot: tuple[Any, Array]) -> tuple[Array, Any]:
            layer, is_layer = layer_in_slot
            y_BSE, kept = block(x_BSE, layer)
            return jnp.where(is_layer, y_BSE, x_BSE), kept

        if probes is not None:
            probes = {name: probe for name, probe in probes.items() if is_stacked(name)}
        layers = (stacked, probes, virtual.prefix, is_rotated)
        if is_layer is None:
            unroll = self.unrolls and self.remat == "none"
            x_BSE, (recorded, seen) = lax.scan(block, x_BSE, layers, unroll=True if unroll else 1)
        else:
            x_BSE, (recorded, seen) = lax.scan(slot, x_BSE, (layers, is_layer))
        return x_BSE, recorded, seen

    def head(self, x_BSE: Array, point: DropoutPoint | None) -> Array:
        """Logits [B, T, vocab] from the last layer's output."""
        x_BSE = tap("norm", self.normed(x_BSE))
        return tap("logits", self.projected(x_BSE, point))


def is_worth_unrolling(spec: ModelSpec, *, platform: str) -> bool:
    """Whether a program should have a model's blocks one after the other.

    In a loop a CPU copies each layer's weights out of their stack and what is kept of it into stacks, which takes a third of a
    step in bfloat16. Without one it compiles longer for each layer: not for small models, whose steps are short, or many layers.
    """
    return platform == "cpu" and spec.embed >= UNROLLED_WIDTH and spec.layers <= UNROLLED_LAYERS


def is_apart(stack: Any) -> bool:
    """Whether a stack has each layer's array apart."""
    return type(stack) is list


def rotated_layers(spec: ModelSpec, order: Iterable[int | None]) -> NDArray[np.bool_] | None:
    """Whether the layer in each slot of a stack rotates queries and keys; None where all of them do."""
    return np.array([layer not in spec.unrotated for layer in order]) if spec.unrotated else None


def turning(rotated: Array | NDArray[np.bool_], cos: Array, sin: Array) -> tuple[Array, Array]:
    """The tables where `rotated`, or else those of the angle 0, which turn nothing."""
    return jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
