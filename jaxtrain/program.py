"""The compiled programs of a recipe: pure functions of dicts of arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from jaxtrain.attention import REFERENCE, choose_kernel, site_of
from jaxtrain.attention.one_token import over_one_token_too
from jaxtrain.decoder import Decoder
from jaxtrain.decoding import CachedPrograms
from jaxtrain.feed import Feeder
from jaxtrain.methods import attach, tied, with_virtual_tokens
from jaxtrain.model import build_model
from jaxtrain.optim import Moments, Rates, clip, global_norm, make_optimizer
from jaxtrain.passes import passes_of
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import Draw, simulate
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.storage import Storage
from jaxtrain.weight_ops import BoundWeight, select_chunk
from jaxtrain.weights import Arrays, is_stacked, native_name
from trainspec.methods import leading_positions
from trainspec.plans.pipeline import stack_order
from trainspec.runs.run import Run
from trainspec.step import Roundings


class StepGradients(NamedTuple):
    """Loss, mean gradients and their norm over a global batch. Activations have the accumulation slices in front."""

    loss_sum: Array
    tokens: Array
    norm: Array
    gradients: Arrays
    activations: Arrays
    activation_gradients: Arrays


class Program:
    """The compiled functions of one recipe: pure functions of dicts of arrays.

    `train` is a whole update; `gradients` and `update` are its halves, for callers who need the gradients.
    """

    def __init__(self, run: Run, mesh: Mesh) -> None:
        recipe, spec = run.recipe, run.spec
        self.run, self.recipe = run, recipe
        order = stack_order(recipe.plan, spec.layers)
        self.shardings = Shardings(mesh, recipe.plan, run.full_table)
        self.storage = Storage(recipe.precision, self.shardings, order)
        self.feeder = Feeder(recipe, self.shardings)
        site = site_of(run, mesh)
        self.attention = choose_kernel(recipe.plan, site)
        model = build_model(
            spec,
            policy=recipe.precision.policy,
            remat=recipe.plan.remat,
            constrain=self.shardings.constrain,
            attend=over_one_token_too(self.attention.make(site)),
            platform=self.shardings.platform,
        )
        self.constants = attach(model, spec, recipe.method, seed=recipe.run.seed, order=order)
        self._tied = tied(spec, recipe.method)
        self._definition, self._template = nnx.split(model)
        self._passes = passes_of(
            recipe.plan, spec, self.shardings, self._bind_weights, self.storage.compute_dtype
        )
        decayed = frozenset(native_name(p)[0] for p in run.trained if p.decay)
        self.optimizer = make_optimizer(recipe.optimizer, decayed)
        self.train = jax.jit(self._train, donate_argnums=(0, 2, 3), keep_unused=True)
        self.gradients = jax.jit(self._gradients, static_argnames="record_activations", keep_unused=True)
        self.rounded_gradients = jax.jit(
            self._rounded_gradients, static_argnames=("record_activations", "roundings"), keep_unused=True
        )
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2), keep_unused=True)
        self.evaluate = jax.jit(self._evaluate)
        self.logits = jax.jit(self._logits)
        self.rounded_logits = jax.jit(self._rounded_logits, static_argnames="roundings")
        self.next_logits = jax.jit(self._next_logits)
        self.cached = (
            None if recipe.plan.pipe > 1 else CachedPrograms(run, self.shardings, self._bind_weights)
        )

    def _bind_weights(
        self, weights: Arrays, grad_placeholders: Arrays, chunk: Array | None = None
    ) -> Decoder:
        """Bind weights to the model: trainable ones get a gradient placeholder, all get a sharding; constants stay arrays.

        If a stack has several model chunks, `chunk` [K] is the one in use in each slot.
        """

        def leaf(name: str) -> Any:
            name = self._tied.get(name, name)
            chunk_in_use = chunk if is_stacked(name) else None
            if name in self.constants:
                constant = weights[name]
                return constant if chunk_in_use is None else jax.vmap(select_chunk)(constant, chunk_in_use)
            sharding = self.shardings.weight(
                name, is_trained=name in grad_placeholders, gradient_dtype=self.storage.reduce_dtype
            )
            return BoundWeight(weights[name], grad_placeholders.get(name), chunk_in_use, sharding)

        template = nnx.to_flat_state(self._template)
        values = [(path, variable.replace(leaf(".".join(map(str, path))))) for path, variable in template]
        return nnx.merge(self._definition, nnx.from_flat_state(values))

    def _evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        return self._passes.evaluate(weights, with_virtual_tokens(batch, self.recipe.method))

    def _logits(self, weights: Arrays, batch: Arrays) -> Array:
        logits = self._passes.logits(weights, with_virtual_tokens(batch, self.recipe.method))
        return logits[:, leading_positions(self.recipe.method) :]

    def _rounded_logits(self, weights: Arrays, batch: Arrays, draw: Draw, *, roundings: Roundings) -> Array:
        assert self.attention is REFERENCE, "only the reference's roundings are simulated"
        with simulate(roundings, draw):
            return self._logits(weights, batch)

    def _next_logits(self, weights: Arrays, batch: Arrays, last_B: Array) -> Array:
        method = self.recipe.method
        return self._passes.next_logits(
            weights, with_virtual_tokens(batch, method), last_B + leading_positions(method)
        )

    def _train(
        self,
        trainable: Arrays,
        frozen: Arrays,
        master: Arrays,
        moments: Moments,
        stacked: Arrays,
        step: Array,
        scalars: Rates,
    ) -> tuple[StepGradients, tuple[Arrays, Arrays, Moments]]:
        """A whole update, its result without gradients. If loss or norm is not finite, the state is returned unchanged."""
        result = self._gradients(trainable, frozen, stacked, step, record_activations=False)
        # A gradient is rounded here as it is between two programs: fused with the update it might not be.
        gradients, norm = lax.optimization_barrier((result.gradients, result.norm))
        is_finite = jnp.isfinite(result.loss_sum) & jnp.isfinite(norm)
        updated = self._update(trainable, master, moments, gradients, norm, scalars, is_finite)
        return result._replace(norm=norm, gradients={}), updated

    def _gradients(
        self, trainable: Arrays, frozen: Arrays, stacked: Arrays, step: Array, *, record_activations: bool
    ) -> StepGradients:
        """Everything up to the norm; `stacked` is the global batch with its accumulation slices in front."""
        weights, stacked = trainable | frozen, with_virtual_tokens(stacked, self.recipe.method)
        zeros = {name: jnp.zeros(w.shape, self.storage.reduce_dtype) for name, w in trainable.items()}
        grad_placeholders = constrain_all(zeros, self.shardings.of["gradients"])

        def add(
            totals: tuple[Array, Array, Arrays], batch: Arrays
        ) -> tuple[tuple[Array, Array, Arrays], tuple[Arrays, Arrays]]:
            output = self._passes.gradients(
                weights, grad_placeholders, batch, step, record_activations=record_activations
            )
            loss_sum, tokens, gradients, activations, activation_gradients = output
            sums = jax.tree.map(jnp.add, totals[2], gradients)
            sums = constrain_all(sums, self.shardings.of["gradients"])
            return (totals[0] + loss_sum, totals[1] + tokens, sums), (activations, activation_gradients)

        start = (
            jnp.zeros((), accumulation_dtype(self.storage.compute_dtype)),
            jnp.zeros((), int),
            grad_placeholders,  # zeros
        )
        (loss_sum, tokens, sums), (activations, activation_gradients) = lax.scan(add, start, stacked)
        gradients, activation_gradients = jax.tree.map(
            lambda g: _mean(g, tokens), (sums, activation_gradients)
        )
        gradients = constrain_all(gradients, self.shardings.of["gradients"])
        return StepGradients(
            loss_sum, tokens, global_norm(gradients), gradients, activations, activation_gradients
        )

    def _rounded_gradients(
        self,
        trainable: Arrays,
        frozen: Arrays,
        stacked: Arrays,
        step: Array,
        draw: Draw,
        *,
        roundings: Roundings,
        record_activations: bool,
    ) -> StepGradients:
        assert self.attention is REFERENCE, "only the reference's roundings are simulated"
        with simulate(roundings, draw):
            return self._gradients(trainable, frozen, stacked, step, record_activations=record_activations)

    def _update(
        self,
        trainable: Arrays,
        master: Arrays,
        moments: Moments,
        gradients: Arrays,
        norm: Array,
        scalars: Rates,
        is_finite: Array | None = None,
    ) -> tuple[Arrays, Arrays, Moments]:
        """Clip and AdamW: each device updates the shards of weights that it holds the moments of.

        If `is_finite` is given and false, the state is returned unchanged.
        """
        shardings = self.shardings.of["optimizer"]
        gradients = constrain_all(
            {n: g.astype(self.storage.stored_dtype) for n, g in gradients.items()}, shardings
        )
        if self.recipe.optimizer.clip_norm is not None:
            gradients = clip(gradients, norm, max_norm=self.recipe.optimizer.clip_norm)
        before = stored = constrain_all(master or trainable, shardings)
        deltas, next_moments = self.optimizer.update(gradients, moments, stored, rates=scalars)
        stored = constrain_all(jax.tree.map(jnp.add, stored, deltas), shardings)
        if is_finite is not None:
            stored, next_moments = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old), (stored, next_moments), (before, moments)
            )
        return self.storage.computed(stored), stored if master else {}, self.storage.sharded(next_moments)


def _mean(total: Array, count: Array) -> Array:
    """total / count in the total's type, divided in the accumulation type: bfloat16 would round the count."""
    return (total.astype(accumulation_dtype(total.dtype)) / count).astype(total.dtype)
