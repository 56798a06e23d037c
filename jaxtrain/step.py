"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from jaxtrain.activations import by_point, zero_probes
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
from trainspec.loop import Metrics
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe
from trainspec.trace import Keep


class Found(NamedTuple):
    """What a forward and a backward pass over the global batch give; activations have microbatches in front."""

    loss_sum: Array
    tokens: Array
    norm: Array
    gradients: Weights
    activations: Weights
    activation_gradients: Weights


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
    program = _program(recipe, spec)  # pyright: ignore[reportArgumentType] (a frozen model is hashable)
    weights = from_canonical(starting_weights(recipe, spec), layers=spec.layers)
    trained = {native_name(p)[0] for p in trainable_table(spec, recipe.method)}
    trainable = {name: weights.pop(name) for name in sorted(trained)}
    frozen = weights | {name: jnp.asarray(value) for name, value in program.constants.items()}
    return State(0, trainable, frozen, cast(Moments, program.optimizer.init(trainable)), program)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    program = state.program
    parts = batch.split(program.recipe.batch.accumulation)
    stacked = {f: jnp.stack([getattr(part, f) for part in parts]) for f in Batch.__dataclass_fields__}
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    found = program.gradients(
        state.trainable, state.frozen, stacked, jnp.int32(state.step), listen=keep == "activations"
    )
    if not math.isfinite(found.loss_sum) or not math.isfinite(found.norm):
        raise NonFiniteLossError(
            f"step {state.step + 1}: loss sum {found.loss_sum}, gradient norm {found.norm}"
        )
    metrics = _metrics(program, found, keep)
    trainable, moments = program.update(state.trainable, state.moments, found.gradients, found.norm, scalars)
    return replace(state, step=state.step + 1, trainable=trainable, moments=moments), metrics


def _metrics(program: Program, found: Found, keep: Keep) -> Metrics:
    metrics = Metrics(float(found.loss_sum), int(found.tokens), float(found.norm))
    if keep == "nothing":
        return metrics
    metrics = replace(metrics, gradients=to_canonical(found.gradients, program.trainable_rows))
    if keep == "gradients":
        return metrics
    activations, gradients = by_point(found.activations), by_point(found.activation_gradients)
    return replace(metrics, activations=activations, activation_gradients=gradients)


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
        self.gradients = jax.jit(self._gradients, static_argnames="listen")
        self.update = jax.jit(self._update, donate_argnums=(0, 1))
        self.evaluate = jax.jit(lambda w, batch: token_loss(self._forward(w, batch)[0], batch["labels"]))
        self.logits = jax.jit(lambda w, batch: self._forward(w, batch)[0])

    def _forward(
        self,
        weights: Weights,
        batch: Weights,
        point: DropoutPoint | None = None,
        probes: Weights | None = None,
    ) -> tuple[Array, Weights]:
        """Logits [B, S, vocab], and the activations at `probes`."""
        template = nnx.to_flat_state(self._template)
        values = [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in template]
        model = nnx.merge(self._definition, nnx.from_flat_state(values))
        inputs = {name: batch[name] for name in ("positions", "segments")}
        return model(batch["input_ids"], **inputs, point=point, probes=probes)

    def _gradients(
        self, trainable: Weights, frozen: Weights, stacked: Weights, step: Array, *, listen: bool
    ) -> Found:
        """Everything up to the norm, over the global batch; `stacked` has the microbatches in front."""
        dtype = next(iter(trainable.values())).dtype
        _, B, S = stacked["input_ids"].shape
        probes = zero_probes(self.spec, (B, S), dtype) if listen else {}

        def loss(trainable: Weights, probes: Weights, batch: Weights) -> tuple[Array, tuple[Array, Weights]]:
            point = DropoutPoint(step, batch["rows"])
            logits, seen = self._forward(trainable | frozen, batch, point, probes)
            loss_sum, tokens = token_loss(logits, batch["labels"])
            return loss_sum, (tokens, seen)

        def add(
            totals: tuple[Array, Array, Weights], batch: Weights
        ) -> tuple[tuple[Array, Array, Weights], tuple[Weights, Weights]]:
            (loss_sum, (tokens, seen)), (gradients, by_probe) = jax.value_and_grad(
                loss, argnums=(0, 1), has_aux=True
            )(trainable, probes, batch)
            sums = jax.tree.map(jnp.add, totals[2], gradients)
            return (totals[0] + loss_sum, totals[1] + tokens, sums), (seen, by_probe)

        nothing = (jnp.zeros((), dtype), jnp.zeros((), int), jax.tree.map(jnp.zeros_like, trainable))
        (loss_sum, tokens, sums), (seen, by_probe) = lax.scan(add, nothing, stacked)
        gradients, by_probe = jax.tree.map(lambda g: g / tokens, (sums, by_probe))
        return Found(loss_sum, tokens, global_norm(gradients), gradients, seen, by_probe)

    def _update(
        self, trainable: Weights, moments: Moments, gradients: Weights, norm: Array, scalars: Rates
    ) -> tuple[Weights, Moments]:
        if self.recipe.optimizer.clip_norm is not None:
            gradients = clip(gradients, norm, max_norm=self.recipe.optimizer.clip_norm)
        deltas, next_moments = self.optimizer.update(gradients, moments, trainable, rates=scalars)
        return jax.tree.map(jnp.add, trainable, deltas), cast(Moments, next_moments)
