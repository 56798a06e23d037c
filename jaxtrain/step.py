"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from jaxtrain.dropout import DropoutPoint
from jaxtrain.loss import token_loss
from jaxtrain.methods import attach
from jaxtrain.model import build_model
from jaxtrain.optim import Moments, Rates, Weights, clip, global_norm, make_optimizer, rates
from jaxtrain.weights import from_canonical, native_name, to_canonical
from trainspec.checkpoint import Checkpoint
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe


@dataclass(frozen=True)
class Metrics:
    """What one update showed. `grad_norm` is before clipping; `gradients` is there where it was asked for."""

    loss_sum: float
    tokens: int
    grad_norm: float
    gradients: dict[str, NDArray[Any]] | None


@dataclass(frozen=True)
class State:
    """A run after `step` updates. Frozen weights have no gradient and no moments."""

    step: int
    trainable: Weights
    frozen: Weights
    moments: Moments
    program: Program


def init_state(recipe: Recipe, spec: ModelSpec) -> State:
    """The run before its first update."""
    program = _program(recipe, spec)
    weights = from_canonical(starting_weights(recipe, spec), layers=spec.layers)
    trained = {native_name(p)[0] for p in trainable_table(spec, recipe.method)}
    trainable = {name: weights.pop(name) for name in sorted(trained)}
    frozen = weights | {name: jnp.asarray(value) for name, value in program.constants.items()}
    return State(0, trainable, frozen, cast(Moments, program.optimizer.init(trainable)), program)


def train_step(
    state: State, batch: Batch, *, lr: float, keep_gradients: bool = False
) -> tuple[State, Metrics]:
    """One update from one global batch, split into `batch.accumulation` microbatches. Consumes `state`.

    Raises NonFiniteLossError before the update: `state` is then still good.
    """
    program = state.program
    parts = batch.split(program.recipe.batch.accumulation)
    stacked = {f: jnp.stack([getattr(part, f) for part in parts]) for f in Batch.__dataclass_fields__}
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    loss_sum, tokens, norm, gradients = program.gradients(
        state.trainable, state.frozen, stacked, jnp.int32(state.step)
    )
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        raise NonFiniteLossError(f"step {state.step + 1}: loss sum {loss_sum}, gradient norm {norm}")
    kept = to_canonical(gradients, program.trainable_rows) if keep_gradients else None
    trainable, moments = program.update(state.trainable, state.moments, gradients, norm, scalars)
    metrics = Metrics(float(loss_sum), int(tokens), float(norm), kept)
    return replace(state, step=state.step + 1, trainable=trainable, moments=moments), metrics


def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """Sum of the token losses of a batch and how many tokens that is, without dropout."""
    loss_sum, tokens = state.program.evaluate(state.trainable | state.frozen, _arrays(batch))
    return float(loss_sum), int(tokens)


def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, vocab], without dropout."""
    return np.asarray(state.program.logits(state.trainable | state.frozen, _arrays(batch)))


def weights_of(state: State, *, frozen: bool = False) -> dict[str, NDArray[Any]]:
    """Copies of the trained weights, and on request of the frozen ones, by canonical name."""
    program = state.program
    table = full_table(program.spec, program.recipe.method) if frozen else program.trainable_rows
    return to_canonical(state.trainable | state.frozen, table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    rows = state.program.trainable_rows
    return to_canonical(state.moments.moment1, rows), to_canonical(state.moments.moment2, rows)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when `checkpoint` was taken."""

    def native(arrays: Mapping[str, NDArray[Any]]) -> Weights:
        rows = ((p, arrays[p.name]) for p in state.program.trainable_rows)
        return from_canonical(rows, layers=state.program.spec.layers)

    moments = Moments(native(checkpoint.moment1), native(checkpoint.moment2))
    return replace(state, step=checkpoint.step, trainable=native(checkpoint.weights), moments=moments)


@lru_cache(maxsize=1)
def _program(recipe: Recipe, spec: ModelSpec) -> Program:
    """The recipe's program; one that starts again in the same process is not compiled again."""
    return Program(recipe, spec)


def _arrays(batch: Batch) -> Weights:
    return {f: jnp.asarray(getattr(batch, f)) for f in Batch.__dataclass_fields__}


class Program:
    """The compiled functions of one recipe: pure functions of dicts of arrays, the model's definition fixed."""

    def __init__(self, recipe: Recipe, spec: ModelSpec) -> None:
        self.recipe, self.spec = recipe, spec
        self.trainable_rows = trainable_table(spec, recipe.method)
        model = build_model(spec, policy=recipe.precision.policy, remat=recipe.plan.remat)
        self.constants = attach(model, spec, recipe.method, seed=recipe.run.seed)
        self._definition, self._template = nnx.split(model)
        decayed = frozenset(native_name(p)[0] for p in self.trainable_rows if p.decay)
        self.optimizer = make_optimizer(recipe.optimizer, decayed)
        self.gradients = jax.jit(self._gradients)
        self.update = jax.jit(self._update, donate_argnums=(0, 1))
        self.evaluate = jax.jit(
            lambda weights, batch: token_loss(self._forward(weights, batch, None), batch["labels"])
        )
        self.logits = jax.jit(lambda weights, batch: self._forward(weights, batch, None))

    def _forward(self, weights: Weights, batch: Weights, point: DropoutPoint | None) -> Array:
        template = nnx.to_flat_state(self._template)
        values = [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in template]
        model = nnx.merge(self._definition, nnx.from_flat_state(values))
        return model(
            batch["input_ids"], positions=batch["positions"], segments=batch["segments"], point=point
        )

    def _gradients(
        self, trainable: Weights, frozen: Weights, stacked: Weights, step: Array
    ) -> tuple[Array, Array, Array, Weights]:
        """Loss sum, token count, norm and gradient of the global batch; `stacked` has microbatches in front."""

        def loss(trainable: Weights, batch: Weights) -> tuple[Array, Array]:
            return token_loss(
                self._forward(trainable | frozen, batch, DropoutPoint(step, batch["rows"])), batch["labels"]
            )

        def add(
            totals: tuple[Array, Array, Weights], batch: Weights
        ) -> tuple[tuple[Array, Array, Weights], None]:
            (loss_sum, tokens), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, batch)
            return (
                totals[0] + loss_sum,
                totals[1] + tokens,
                jax.tree.map(jnp.add, totals[2], gradients),
            ), None

        some = next(iter(trainable.values()))
        nothing = (jnp.zeros((), some.dtype), jnp.zeros((), int), jax.tree.map(jnp.zeros_like, trainable))
        (loss_sum, tokens, sums), _ = lax.scan(add, nothing, stacked)
        gradients = jax.tree.map(lambda g: g / tokens, sums)
        return loss_sum, tokens, global_norm(gradients), gradients

    def _update(
        self, trainable: Weights, moments: Moments, gradients: Weights, norm: Array, scalars: Rates
    ) -> tuple[Weights, Moments]:
        if self.recipe.optimizer.clip_norm is not None:
            gradients = clip(gradients, norm, max_norm=self.recipe.optimizer.clip_norm)
        deltas, next_moments = self.optimizer.update(gradients, moments, trainable, rates=scalars)
        return jax.tree.map(jnp.add, trainable, deltas), cast(Moments, next_moments)
