"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxtrain.activations import by_point
from jaxtrain.attention import REFERENCE, choose_kernel, site_of
from jaxtrain.attention.one_token import over_one_token_too
from jaxtrain.decoder import Decoder
from jaxtrain.decoding import CachedPrograms, CachedRows
from jaxtrain.feed import Feeder
from jaxtrain.mesh import make_mesh
from jaxtrain.methods import attach, tied, with_virtual_tokens
from jaxtrain.model import build_model
from jaxtrain.optim import Moments, Rates, clip, global_norm, make_optimizer, rates
from jaxtrain.passes import passes_of
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import simulate
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.storage import Storage
from jaxtrain.weight_ops import BoundWeight, select_chunk
from jaxtrain.weights import Arrays, is_stacked, native_name, to_host
from trainspec.causal import activation_points
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import KINDS, ArrayKind, Shard
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.methods import leading_positions
from trainspec.plans.pipeline import stack_order
from trainspec.rng import name_key
from trainspec.runs.contract import ArrayFormat, Decoding, Metrics, Roundings
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.trace import Keep
from trainspec.weight import WeightLike


class StepGradients(NamedTuple):
    """Loss, mean gradients and their norm over a global batch. Activations have the accumulation slices in front."""

    loss_sum: Array
    tokens: Array
    norm: Array
    gradients: Arrays
    activations: Arrays
    activation_gradients: Arrays


@dataclass(frozen=True)
class State:
    """A run after `step` updates. Frozen weights have no gradients and no moments.

    In bf16 `trainable` is a bfloat16 copy of the float32 weights in `master`, for computing; otherwise `master` is empty.
    """

    step: int
    trainable: Arrays
    frozen: Arrays
    master: Arrays
    moments: Moments
    program: Program


def init_state(run: Run, *, like: State | None = None) -> State:
    """The run before its first update. Reuses the compiled programs of `like`, a state of an equal recipe."""
    program = like.program if like else Program(run, make_mesh(run.recipe.plan))
    storage = program.storage
    trained = {native_name(p)[0] for p in run.trained}
    entries = [(p, weight, native_name(p)[0] in trained) for p, weight in starting_weights(run)]
    frozen = storage.load(
        ((p, w) for p, w, is_trained in entries if not is_trained), "weights", storage.compute_dtype
    )
    frozen |= program.feeder.constants(program.constants)
    trainable, master = storage.load_trained((p, w) for p, w, is_trained in entries if is_trained)
    moments = storage.zero_moments(master or trainable, program.optimizer)
    return State(0, trainable, frozen, master, moments, program)


def feed(state: State, batch: Batch) -> Batch:
    """The batch on the devices, as `train_step` takes it."""
    return state.program.feeder.ahead(batch)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, however the batch is split.
    `keep` says what the metrics have; with "nothing" the update is one compiled program. Raises NonFiniteLossError before
    the update, with `state` as it was.
    """
    program = state.program
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    stacked, step = program.feeder.slices(batch), jnp.int32(state.step)
    if keep == "nothing":
        result, updated = program.train(
            state.trainable, state.frozen, state.master, state.moments, stacked, step, scalars
        )
        return _checked(state, result, updated)
    result = program.gradients(
        state.trainable, state.frozen, stacked, step, record_activations=keep == "activations"
    )
    metrics = _metrics(program, result, keep)
    _check_finite(metrics, state.step + 1)
    updated = program.update(
        state.trainable, state.master, state.moments, result.gradients, result.norm, scalars
    )
    # Nothing of the update is left to the next one's time.
    trainable, master, moments = jax.block_until_ready(updated)
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def gradients_of(
    state: State, batch: Batch, *, keep: Keep, roundings: Roundings | None = None, draw: int = 0
) -> Metrics:
    """Loss and gradients of a global batch; `state` stays as it is. Raises NonFiniteLossError.

    With `roundings` they are those of a run that rounds every result, up or down by `draw` (float64 runs only).
    """
    program = state.program
    stacked, step = program.feeder.slices(batch), jnp.int32(state.step)
    arguments, record = (state.trainable, state.frozen, stacked, step), keep == "activations"
    if roundings is None:
        result = program.gradients(*arguments, record_activations=record)
    else:
        key = _draw_key(state, draw)
        result = program.rounded_gradients(*arguments, key, roundings=roundings, record_activations=record)
    metrics = _metrics(program, result, keep)
    _check_finite(metrics, state.step + 1)
    return metrics


def _draw_key(state: State, draw: int) -> Array:
    return jnp.uint32(name_key(draw, "roundings", str(state.step))[0])


def _checked(
    state: State, result: StepGradients, updated: tuple[Arrays, Arrays, Moments]
) -> tuple[State, Metrics]:
    """The state and metrics after `Program.train`. Raises NonFiniteLossError, with `state` as it was."""
    trainable, master, moments = updated
    metrics = Metrics(float(result.loss_sum), int(result.tokens), float(result.norm))
    try:
        _check_finite(metrics, state.step + 1)
    except NonFiniteLossError:
        # The program has consumed the state's arrays and returned them unchanged.
        consumed = (state.trainable, state.master, state.moments.moment1, state.moments.moment2)
        for arrays, returned in zip(consumed, (trainable, master, *moments), strict=True):
            arrays.update(returned)
        raise
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def _check_finite(metrics: Metrics, step: int) -> None:
    loss_sum, norm = metrics.loss_sum, metrics.grad_norm
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        raise NonFiniteLossError(f"step {step}: loss sum {loss_sum}, gradient norm {norm}", metrics)


def _metrics(program: Program, result: StepGradients, keep: Keep) -> Metrics:
    metrics = Metrics(float(result.loss_sum), int(result.tokens), float(result.norm))
    metrics = replace(metrics, gradients=program.storage.canonical(result.gradients, program.run.trained))
    if keep == "gradients":
        return metrics
    points = [point.full_name for point in activation_points(program.run.spec, program.recipe.method)]
    recorded = (
        by_point({name: to_host(arrays[name]) for name in sorted(arrays)})
        for arrays in (result.activations, result.activation_gradients)
    )
    # Of a stack that is a target in some layers only, the others are left out.
    activations, gradients = ({point: arrays[point] for point in points} for arrays in recorded)
    return replace(metrics, activations=activations, activation_gradients=gradients)


def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """Loss sum and target tokens of a batch, without dropout."""
    loss_sum, tokens = state.program.evaluate(
        state.trainable | state.frozen, state.program.feeder.feed(batch)
    )
    return float(loss_sum), int(tokens)


def logits(state: State, batch: Batch, *, roundings: Roundings | None = None, draw: int = 0) -> NDArray[Any]:
    """The model's output [B, S, vocab], without dropout.

    With `roundings` that of a run that rounds every result, up or down by `draw` (float64 runs only).
    """
    program = state.program
    arguments = state.trainable | state.frozen, program.feeder.feed(batch)
    if roundings is None:
        return to_host(program.logits(*arguments))
    return to_host(program.rounded_logits(*arguments, _draw_key(state, draw), roundings=roundings))


def next_logits(state: State, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
    """The logits [B, vocab] after position `last` [B] of each row, without dropout."""
    program = state.program
    weights, fed = state.trainable | state.frozen, program.feeder.feed(batch)
    return to_host(program.next_logits(weights, fed, program.feeder.replicated(last)))


def decoding(state: State, *, length: int) -> Decoding | None:
    """A cache for rows of up to `length` tokens; None where a pipeline has the layers."""
    program = state.program
    if program.cached is None:
        return None
    return CachedRows(program.cached, state.trainable | state.frozen, program.feeder, length=length)


def weights_of(state: State, *, frozen: bool = False) -> dict[str, NDArray[Any]]:
    """Copies of the trained weights (the masters), with `frozen` of all weights, by canonical name."""
    program = state.program
    table = program.run.full_table if frozen else program.run.trained
    return program.storage.canonical(state.frozen | (state.master or state.trainable), table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    storage, moments, trained = state.program.storage, state.moments, state.program.run.trained
    return storage.canonical(moments.moment1, trained), storage.canonical(moments.moment2, trained)


def arrays_of(state: State) -> dict[ArrayKind, Arrays]:
    """The native arrays of a checkpoint: the trained weights (the masters) and both moments."""
    moments = state.moments
    return {
        "weights": state.master or state.trainable,
        "moment1": moments.moment1,
        "moment2": moments.moment2,
    }


def shards_of(state: State, copy: Copy = np.copy) -> Iterator[Shard]:
    """Copies of what this process saves of weights and moments."""
    program = state.program
    return program.storage.shards(arrays_of(state), program.run.trained, copy)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when the checkpoint was saved; consumes `state`."""
    storage, trained = state.program.storage, state.program.run.trained

    def load(kind: ArrayKind) -> Arrays:
        weights: Mapping[str, WeightLike] = getattr(checkpoint, kind)
        return storage.load_saved(((p, weights[p.name]) for p in trained), kind)

    return _replaced(state, checkpoint.step, lambda: {kind: load(kind) for kind in KINDS})


def _replaced(state: State, step: int, load: Callable[[], Mapping[ArrayKind, Arrays]]) -> State:
    """`state` with the arrays that `load` gives. Its own are freed first: two states at once would need twice the memory."""
    for arrays in (state.trainable, state.master, *state.moments):
        for array in arrays.values():
            array.delete()
    loaded = load()
    trainable, master = state.program.storage.with_masters(loaded["weights"])
    moments = Moments(loaded["moment1"], loaded["moment2"])
    return replace(state, step=step, trainable=trainable, master=master, moments=moments)


def native_format(run: Run, processes: Processes) -> ArrayFormat[State]:
    """Checkpoints of orbax."""
    # Most runs do without.
    from jaxtrain.native import NativeFormat

    return NativeFormat(
        run,
        processes,
        storage_of=lambda state: state.program.storage,
        arrays_of=arrays_of,
        replaced=_replaced,
    )


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

    def _rounded_logits(self, weights: Arrays, batch: Arrays, key: Array, *, roundings: Roundings) -> Array:
        assert self.attention is REFERENCE, "only the reference's roundings are simulated"
        with simulate(roundings, key):
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
        key: Array,
        *,
        roundings: Roundings,
        record_activations: bool,
    ) -> StepGradients:
        assert self.attention is REFERENCE, "only the reference's roundings are simulated"
        with simulate(roundings, key):
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
