"""A cache of keys and values: the pass over the prompts fills it, and each token after that is computed alone.

Both are compiled once per shape. What the virtual tokens of a method give is kept as that of any token, so their encoder runs
once a batch. Which places of a row a token sees is said by `attention.visible`, as in training.

L layers, B rows, T keys that are kept (those of a prefix in front), K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxtrain.decoder import Kept
from jaxtrain.feed import Feeder
from jaxtrain.layers import KeysValues, at_position
from jaxtrain.methods import with_virtual_tokens
from jaxtrain.methods.dora import give_norms, norms_of
from jaxtrain.methods.virtual_tokens import all_positions, all_segments
from jaxtrain.pipeline import ModelFactory
from jaxtrain.sharding import Shardings
from jaxtrain.weight_ops import OutputsFirst
from jaxtrain.weights import TRANSPOSED, Arrays, is_stacked, to_host
from trainspec.data import Batch
from trainspec.methods import ENCODER, leading_positions, virtual_tokens
from trainspec.runs.run import Run

# Logical axes of a layer's keys and values as they are kept: each as it is multiplied, which a CPU would do by a copy otherwise.
KEY_AXES, VALUE_AXES = ("batch", "kv_heads", "dim", "seq"), ("batch", "kv_heads", "seq", "dim")


class Cache(NamedTuple):
    """Keys and values of every layer, and how many tokens of each row they are of: what is beyond is not seen."""

    kept: Kept
    tokens_B: Array


class CachedPrograms:
    """The compiled functions of one recipe.

    On a CPU layers are apart: it would copy what it takes of a stack, for every token all weights and the whole cache. Their
    matrices are transposed.
    Elsewhere the program is a scan over the stack, as in training.
    """

    def __init__(self, run: Run, shardings: Shardings, bind_weights: ModelFactory) -> None:
        self._run, self._shardings, self._bind_weights = run, shardings, bind_weights
        leading = leading_positions(run.recipe.method)
        self._leading, self._prefix = leading, virtual_tokens(run.recipe.method) - leading
        self.is_apart = shardings.platform == "cpu"
        self.begin = jax.jit(self._begin, static_argnames="length")
        self.extend = jax.jit(self._extend, donate_argnames="cache")
        self._once = jax.jit(self._computed_once)

    def _begin(self, weights: Arrays, batch: Arrays, last_B: Array, *, length: int) -> tuple[Array, Cache]:
        """The logits [B, vocab] after position `last_B` of each row, and a cache for rows of `length` tokens."""
        model, seen = self._bind_weights(weights, {}), with_virtual_tokens(batch, self._run.recipe.method)

        def end(x_BTE: Array) -> Array:
            return model.head(at_position(x_BTE, last_B + self._leading), None)[:, 0]

        logits_BV, made = model.begin(
            seen["input_ids"], positions=seen["positions"], segments=seen["segments"], end=end
        )
        keys = self._kept(jnp.moveaxis(made.keys, 2, 4), KEY_AXES, length)
        values = self._kept(jnp.moveaxis(made.values, 2, 3), VALUE_AXES, length)
        kept: Kept = KeysValues(keys, values)
        if self.is_apart:
            kept = [KeysValues(k, v) for k, v in zip(keys, values, strict=True)]
        return logits_BV, Cache(kept, last_B + 1)

    def _kept(self, x: Array, axes: tuple[str, ...], length: int) -> Array:
        """Keys or values of all layers, which have these logical axes, with room for rows of `length` tokens."""
        axes = ("layers", *axes)
        tokens = axes.index("seq")
        room = self._prefix + self._leading + length - x.shape[tokens]
        x = jnp.pad(x, [(0, room if dim == tokens else 0) for dim in range(x.ndim)])
        return self._shardings.constrain(x, axes)

    def _extend(self, weights: Any, cache: Cache, ids_B: Array) -> tuple[Array, Cache]:
        """The logits [B, vocab] after one more token of each row, and the cache with it; -1 adds none."""
        method, virtual = self._run.recipe.method, self._prefix + self._leading
        *_, rows, _, _, keys = jax.tree.leaves(cache.kept)[0].shape
        order_BS = jnp.broadcast_to(jnp.arange(keys - virtual), (rows, keys - virtual))
        model = self._bind_weights(weights, {})
        give_norms(model, weights)
        logits_BV, kept = model.extend(
            jnp.maximum(ids_B, 0),
            cache.tokens_B + self._leading,
            cache.kept,
            prefix=self._prefix,
            positions=all_positions(order_BS, method),
            segments=all_segments(jnp.ones_like(order_BS), method),
        )
        return logits_BV, Cache(kept, cache.tokens_B + (ids_B >= 0))

    def prepare(self, weights: Arrays) -> Any:
        """The weights as `extend` takes them, with what it would compute of them alone for every token."""
        return weights | self._once(weights)

    def _computed_once(self, weights: Arrays) -> dict[str, Any]:
        """The norms of DoRA, and on a CPU all weights but an encoder's as it multiplies with them."""
        norms = norms_of(self._bind_weights(weights, {}))
        if not self.is_apart:
            return dict(norms)
        needed = {name: w for name, w in weights.items() if not name.startswith(ENCODER)}
        return {name: _as_multiplied(name, w) for name, w in (needed | norms).items()}


def _as_multiplied(name: str, weight: Array) -> Any:
    """A weight as a CPU multiplies few rows with it: matrices with outputs first, those of a stack each by itself."""
    layers = list(weight) if is_stacked(name) else [weight]
    if name.endswith(TRANSPOSED):
        layers = [OutputsFirst(w.T) for w in layers]
    return layers if is_stacked(name) else layers[0]


class CachedRows:
    """`Decoding` with a cache for rows of up to `length` tokens.

    Differs from torchtrain: it has the weights, as each program is given them.
    """

    def __init__(self, programs: CachedPrograms, weights: Arrays, feeder: Feeder, *, length: int) -> None:
        self._programs, self._weights, self._feeder, self._length = programs, weights, feeder, length
        self._weights_of_step = programs.prepare(weights)
        self._cache: Cache | None = None

    def begin(self, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row."""
        length = max(self._length, batch.input_ids.shape[1])
        fed, fed_last = self._feeder.feed(batch), self._feeder.replicated(last)
        logits_BV, self._cache = self._programs.begin(self._weights, fed, fed_last, length=length)
        return to_host(logits_BV)

    def extend(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after one more token [B] of each row; -1 for a row that has ended."""
        assert self._cache is not None, "begin comes first"
        logits_BV, self._cache = self._programs.extend(
            self._weights_of_step, self._cache, self._feeder.replicated(ids)
        )
        return to_host(logits_BV)
