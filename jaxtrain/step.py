"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxtrain.activations import by_point
from jaxtrain.decoder import Decoder
from jaxtrain.feed import Feeder
from jaxtrain.mesh import make_mesh
from jaxtrain.methods import all_rows, attach
from jaxtrain.model import build_model
from jaxtrain.optim import Moments, Rates, clip, global_norm, make_optimizer, rates
from jaxtrain.passes import passes_of
from jaxtrain.precision import accumulation_dtype
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.storage import Storage
from jaxtrain.weight_ops import BoundWeight, select_chunk
from jaxtrain.weights import Arrays, is_stacked, native_name, to_host
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.methods import leading_rows
from trainspec.params import Param
from trainspec.plans.pipeline import stack_order
from trainspec.runs.checkpoint import Checkpoint
from trainspec.runs.contract import Metrics
from trainspec.runs.run import Run
from trainspec.trace import Keep
from trainspec.weight import WeightLike


class Found(NamedTuple):
    """What a forward and a backward pass over the global batch give; activations have microbatches in front."""

    loss_sum: Array
    tokens: Array
    norm: Array
    gradients: Arrays
    activations: Arrays
    activation_gradients: Arrays


@dataclass(frozen=True)
class State:
    """A run after `step` updates. Frozen weights have no gradient and no moments.

    In bf16 `trainable` is the bfloat16 copy that is computed with and `master` the float32 weights; else `master` is
    empty and `trainable` is both.
    """

    step: int
    trainable: Arrays
    frozen: Arrays
    master: Arrays
    moments: Moments
    program: Program


def init_state(run: Run, *, like: State | None = None) -> State:
    """The run before its first update. The programs of `like`, a state of an equal recipe, are used again."""
    program = like.program if like else Program(run, make_mesh(run.recipe.plan))
    storage = program.storage
    trained = {native_name(p)[0] for p in run.trained}
    rows = [(p, weight, native_name(p)[0] in trained) for p, weight in starting_weights(run)]
    frozen = storage.load(((p, w) for p, w, trains in rows if not trains), "weights", storage.compute_dtype)
    frozen |= program.feeder.constants(program.constants)
    trainable, master = storage.load_trained((p, w) for p, w, trains in rows if trains)
    moments = storage.no_moments(master or trainable, program.optimizer)
    return State(0, trainable, frozen, master, moments, program)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches. Raises NonFiniteLossError before the update, with `state` as it was. Where nothing is kept it is
    one program.
    """
    program = state.program
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    stacked, step = program.feeder.parts(batch), jnp.int32(state.step)
    if keep == "nothing":
        found, updated = program.train(
            state.trainable, state.frozen, state.master, state.moments, stacked, step, scalars
        )
        return _checked(state, found, updated)
    found = program.gradients(state.trainable, state.frozen, stacked, step, listen=keep == "activations")
    _check_finite(found, state.step + 1)
    metrics = _metrics(program, found, keep)
    trainable, master, moments = program.update(
        state.trainable, state.master, state.moments, found.gradients, found.norm, scalars
    )
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def _checked(state: State, found: Found, updated: tuple[Arrays, Arrays, Moments]) -> tuple[State, Metrics]:
    """What one program made of `state`. Raises NonFiniteLossError, where it has changed nothing."""
    trainable, master, moments = updated
    try:
        _check_finite(found, state.step + 1)
    except NonFiniteLossError:
        # The program has taken the state's arrays and given them back as they were.
        given = (state.trainable, state.master, state.moments.moment1, state.moments.moment2)
        for mine, back in zip(given, (trainable, master, *moments), strict=True):
            mine.update(back)
        raise
    metrics = Metrics(float(found.loss_sum), int(found.tokens), float(found.norm))
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def _check_finite(found: Found, step: int) -> None:
    if not math.isfinite(found.loss_sum) or not math.isfinite(found.norm):
        raise NonFiniteLossError(f"step {step}: loss sum {found.loss_sum}, gradient norm {found.norm}")


def _metrics(program: Program, found: Found, keep: Keep) -> Metrics:
    metrics = Metrics(float(found.loss_sum), int(found.tokens), float(found.norm))
    metrics = replace(metrics, gradients=program.storage.canonical(found.gradients, program.run.trained))
    if keep == "gradients":
        return metrics
    activations, gradients = (
        by_point({point: to_host(recorded[point]) for point in sorted(recorded)})
        for recorded in (found.activations, found.activation_gradients)
    )
    return replace(metrics, activations=activations, activation_gradients=gradients)


def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """Sum of the token losses of a batch and how many tokens that is, without dropout."""
    loss_sum, tokens = state.program.evaluate(
        state.trainable | state.frozen, state.program.feeder.feed(batch)
    )
    return float(loss_sum), int(tokens)


def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, vocab], without dropout."""
    return to_host(state.program.logits(state.trainable | state.frozen, state.program.feeder.feed(batch)))


def weights_of(state: State, *, frozen: bool = False) -> dict[str, NDArray[Any]]:
    """Copies of the trained weights (the masters), and on request of the frozen ones, by canonical name."""
    program = state.program
    table = program.run.full_table if frozen else program.run.trained
    return program.storage.canonical(state.frozen | (state.master or state.trainable), table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    storage, moments, trained = state.program.storage, state.moments, state.program.run.trained
    return storage.canonical(moments.moment1, trained), storage.canonical(moments.moment2, trained)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when `checkpoint` was taken."""
    storage, trained = state.program.storage, state.program.run.trained

    def rows(arrays: Mapping[str, WeightLike]) -> Iterator[tuple[Param, WeightLike]]:
        return ((p, arrays[p.name]) for p in trained)

    trainable, master = storage.load_trained(rows(checkpoint.weights))
    moments = Moments(
        *(
            storage.load(rows(moment), "optimizer", storage.stored_dtype)
            for moment in (checkpoint.moment1, checkpoint.moment2)
        )
    )
    return replace(state, step=checkpoint.step, trainable=trainable, master=master, moments=moments)


class Program:
    """The compiled functions of one recipe: pure functions of dicts of arrays, the model's definition fixed.

    `train` is a whole update; `gradients` and `update` are its halves, for whoever looks at what is between them.
    """

    def __init__(self, run: Run, mesh: Mesh) -> None:
        recipe, spec = run.recipe, run.spec
        self.run, self.recipe = run, recipe
        order = stack_order(recipe.plan, spec.layers)
        self.shardings = Shardings(mesh, recipe.plan, run.full_table)
        self.storage = Storage(recipe.precision, self.shardings, order)
        self.feeder = Feeder(recipe, self.shardings)
        model = build_model(
            spec, policy=recipe.precision.policy, remat=recipe.plan.remat, constrain=self.shardings.constrain
        )
        self.constants = attach(model, spec, recipe.method, seed=recipe.run.seed, order=order)
        self._definition, self._template = nnx.split(model)
        self._passes = passes_of(recipe.plan, spec, self.shardings, self._in_use, self.storage.compute_dtype)
        decayed = frozenset(native_name(p)[0] for p in run.trained if p.decay)
        self.optimizer = make_optimizer(recipe.optimizer, decayed)
        self.train = jax.jit(self._train, donate_argnums=(0, 2, 3), keep_unused=True)
        self.gradients = jax.jit(self._gradients, static_argnames="listen", keep_unused=True)
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2), keep_unused=True)
        self.evaluate = jax.jit(self._evaluate)
        self.logits = jax.jit(self._logits)

    def _in_use(self, weights: Arrays, slots: Arrays, piece: Array | None = None) -> Decoder:
        """The model with these weights: a trained one has a slot, and all have their places; constants are as they are.

        `piece` [L] says which of its pieces each layer of a stack is, where a stack has several.
        """

        def leaf(name: str) -> Any:
            which = piece if is_stacked(name) else None
            if name in self.constants:
                return weights[name] if which is None else jax.vmap(select_chunk)(weights[name], which)
            sharding = self.shardings.weight(
                name, is_trained=name in slots, gradient_dtype=self.storage.reduce_dtype
            )
            return BoundWeight(weights[name], slots.get(name), which, sharding)

        template = nnx.to_flat_state(self._template)
        values = [(path, variable.replace(leaf(".".join(map(str, path))))) for path, variable in template]
        return nnx.merge(self._definition, nnx.from_flat_state(values))

    def _evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        return self._passes.evaluate(weights, all_rows(batch, self.recipe.method))

    def _logits(self, weights: Arrays, batch: Arrays) -> Array:
        rows = self._passes.logits(weights, all_rows(batch, self.recipe.method))
        return rows[:, leading_rows(self.recipe.method) :]

    def _train(
        self,
        trainable: Arrays,
        frozen: Arrays,
        master: Arrays,
        moments: Moments,
        stacked: Arrays,
        step: Array,
        scalars: Rates,
    ) -> tuple[Found, tuple[Arrays, Arrays, Moments]]:
        """A whole update; of what was found its gradients are left out. Nothing changes where it is not finite."""
        found = self._gradients(trainable, frozen, stacked, step, listen=False)
        # A gradient is rounded here as it is between two programs: fused with the update it might not be.
        gradients, norm = lax.optimization_barrier((found.gradients, found.norm))
        is_finite = jnp.isfinite(found.loss_sum) & jnp.isfinite(norm)
        updated = self._update(trainable, master, moments, gradients, norm, scalars, is_finite)
        return found._replace(norm=norm, gradients={}), updated

    def _gradients(
        self, trainable: Arrays, frozen: Arrays, stacked: Arrays, step: Array, *, listen: bool
    ) -> Found:
        """Everything up to the norm, over the global batch; `stacked` has the parts of accumulation in front."""
        weights, stacked = trainable | frozen, all_rows(stacked, self.recipe.method)
        nothing = {name: jnp.zeros(w.shape, self.storage.reduce_dtype) for name, w in trainable.items()}
        slots = constrain_all(nothing, self.shardings.of["gradients"])

        def add(
            totals: tuple[Array, Array, Arrays], batch: Arrays
        ) -> tuple[tuple[Array, Array, Arrays], tuple[Arrays, Arrays]]:
            passed = self._passes.gradients(weights, slots, batch, step, listen=listen)
            loss_sum, tokens, gradients, seen, by_probe = passed
            sums = jax.tree.map(jnp.add, totals[2], gradients)
            sums = constrain_all(sums, self.shardings.of["gradients"])
            return (totals[0] + loss_sum, totals[1] + tokens, sums), (seen, by_probe)

        start = (jnp.zeros((), accumulation_dtype(self.storage.compute_dtype)), jnp.zeros((), int), slots)
        (loss_sum, tokens, sums), (seen, by_probe) = lax.scan(add, start, stacked)
        gradients, by_probe = jax.tree.map(lambda g: _mean(g, tokens), (sums, by_probe))
        gradients = constrain_all(gradients, self.shardings.of["gradients"])
        return Found(loss_sum, tokens, global_norm(gradients), gradients, seen, by_probe)

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
        """Each device updates the part of weights and moments that it holds moments of.

        Where `is_finite` is given and false, it gives back what it was given.
        """
        part = self.shardings.of["optimizer"]
        gradients = constrain_all(
            {n: g.astype(self.storage.stored_dtype) for n, g in gradients.items()}, part
        )
        if self.recipe.optimizer.clip_norm is not None:
            gradients = clip(gradients, norm, max_norm=self.recipe.optimizer.clip_norm)
        before = stored = constrain_all(master or trainable, part)
        deltas, next_moments = self.optimizer.update(gradients, moments, stored, rates=scalars)
        stored = constrain_all(jax.tree.map(jnp.add, stored, deltas), part)
        if is_finite is not None:
            stored, next_moments = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old), (stored, next_moments), (before, moments)
            )
        computed = self.storage.computed(stored)
        return computed, stored if master else {}, self.storage.placed(next_moments)


def _mean(total: Array, count: Array) -> Array:
    """total / count in the total's type; a count would be rounded to bfloat16 before it divides."""
    return (total.astype(accumulation_dtype(total.dtype)) / count).astype(total.dtype)
