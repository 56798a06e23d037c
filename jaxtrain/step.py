"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.activations import by_point
from jaxtrain.methods import all_rows, attach
from jaxtrain.model import Llama, build_model, wide
from jaxtrain.optim import Moments, Rates, Weights, clip, global_norm, make_optimizer, rates
from jaxtrain.parallel import Layout, constrained, make_mesh
from jaxtrain.passes import passes_of
from jaxtrain.tensor import Weight, chosen
from jaxtrain.weights import from_canonical, is_stacked, native_name, native_shapes, to_canonical, to_host
from trainspec.checkpoint import Checkpoint
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.loop import Metrics
from trainspec.methods import full_table, leading_rows, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.pipeline import stack_order
from trainspec.plan import COMPUTE_DTYPE, STORED_DTYPE, Part
from trainspec.recipe import Recipe
from trainspec.trace import Keep
from trainspec.weight import WeightLike


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
    """A run after `step` updates. Frozen weights have no gradient and no moments.

    In bf16 `trainable` is the bfloat16 copy that is computed with and `master` the float32 weights; else `master` is
    empty and `trainable` is both.
    """

    step: int
    trainable: Weights
    frozen: Weights
    master: Weights
    moments: Moments
    program: Program


def init_state(recipe: Recipe, spec: ModelSpec) -> State:
    """The run before its first update."""
    mesh = make_mesh(recipe.plan)
    program = _program(recipe, spec, mesh)  # pyright: ignore[reportArgumentType] (a frozen model is hashable)
    trained = {native_name(p)[0] for p in trainable_table(spec, recipe.method)}
    rows = [(p, weight, native_name(p)[0] in trained) for p, weight in starting_weights(recipe, spec)]
    frozen = program.load(((p, w) for p, w, trains in rows if not trains), "weights", program.compute_dtype)
    frozen |= program.fed_constants()
    trainable, master = program.load_trained((p, w) for p, w, trains in rows if trains)
    return State(0, trainable, frozen, master, program.no_moments(master or trainable), program)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    program = state.program
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    stacked, step = program.parts(batch), jnp.int32(state.step)
    found = program.gradients(state.trainable, state.frozen, stacked, step, listen=keep == "activations")
    if not math.isfinite(found.loss_sum) or not math.isfinite(found.norm):
        raise NonFiniteLossError(
            f"step {state.step + 1}: loss sum {found.loss_sum}, gradient norm {found.norm}"
        )
    metrics = _metrics(program, found, keep)
    trainable, master, moments = program.update(
        state.trainable, state.master, state.moments, found.gradients, found.norm, scalars
    )
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def _metrics(program: Program, found: Found, keep: Keep) -> Metrics:
    metrics = Metrics(float(found.loss_sum), int(found.tokens), float(found.norm))
    if keep == "nothing":
        return metrics
    metrics = replace(metrics, gradients=program.canonical(found.gradients, program.trainable_rows))
    if keep == "gradients":
        return metrics
    activations, gradients = (
        by_point({point: to_host(recorded[point]) for point in sorted(recorded)})
        for recorded in (found.activations, found.activation_gradients)
    )
    return replace(metrics, activations=activations, activation_gradients=gradients)


def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """Sum of the token losses of a batch and how many tokens that is, without dropout."""
    loss_sum, tokens = state.program.evaluate(state.trainable | state.frozen, state.program.feed(batch))
    return float(loss_sum), int(tokens)


def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, vocab], without dropout."""
    return to_host(state.program.logits(state.trainable | state.frozen, state.program.feed(batch)))


def weights_of(state: State, *, frozen: bool = False) -> dict[str, NDArray[Any]]:
    """Copies of the trained weights (the masters), and on request of the frozen ones, by canonical name."""
    program = state.program
    table = full_table(program.spec, program.recipe.method) if frozen else program.trainable_rows
    return program.canonical(state.frozen | (state.master or state.trainable), table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    program, moments = state.program, state.moments
    rows = program.trainable_rows
    return program.canonical(moments.moment1, rows), program.canonical(moments.moment2, rows)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when `checkpoint` was taken."""
    program = state.program

    def rows(arrays: Mapping[str, WeightLike]) -> Iterator[tuple[Param, WeightLike]]:
        return ((p, arrays[p.name]) for p in program.trainable_rows)

    trainable, master = program.load_trained(rows(checkpoint.weights))
    moments = Moments(
        *(
            program.load(rows(moment), "optimizer", program.stored_dtype)
            for moment in (checkpoint.moment1, checkpoint.moment2)
        )
    )
    return replace(state, step=checkpoint.step, trainable=trainable, master=master, moments=moments)


@lru_cache(maxsize=1)
def _program(recipe: Recipe, spec: ModelSpec, mesh: Mesh) -> Program:
    """The recipe's program; one that starts again in the same process is not compiled again."""
    return Program(recipe, spec, mesh)


class Program:
    """The compiled functions of one recipe: pure functions of dicts of arrays, the model's definition fixed."""

    def __init__(self, recipe: Recipe, spec: ModelSpec, mesh: Mesh) -> None:
        self.recipe, self.spec = recipe, spec
        policy = recipe.precision.policy
        self.stored_dtype, self.compute_dtype = (
            jnp.dtype(STORED_DTYPE[policy]),
            jnp.dtype(COMPUTE_DTYPE[policy]),
        )
        self.reduce_dtype = jnp.dtype(COMPUTE_DTYPE[recipe.precision.reduce])
        self.trainable_rows = trainable_table(spec, recipe.method)
        self.order = stack_order(recipe.plan, spec.layers)
        self.layout = Layout(mesh, recipe.plan, full_table(spec, recipe.method))
        model = build_model(spec, policy=policy, remat=recipe.plan.remat, constrain=self.layout.constrain)
        self.constants = attach(model, spec, recipe.method, seed=recipe.run.seed, order=self.order)
        self._definition, self._template = nnx.split(model)
        self._passes = passes_of(recipe.plan, spec, self.layout, self._in_use, self.compute_dtype)
        decayed = frozenset(native_name(p)[0] for p in self.trainable_rows if p.decay)
        self.optimizer = make_optimizer(recipe.optimizer, decayed)
        self.gradients = jax.jit(self._gradients, static_argnames="listen", keep_unused=True)
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2), keep_unused=True)
        self.evaluate = jax.jit(self._evaluate)
        self.logits = jax.jit(self._logits)

    def feed(self, batch: Batch) -> Weights:
        """The arrays of a batch, their rows split over the replicas; in a pipeline with the microbatches in front."""
        return self._fed((batch,), self.recipe.plan.microbatches_of(len(batch.rows)), front=())

    def parts(self, batch: Batch) -> Weights:
        """The same with the parts of accumulation in front."""
        parts = batch.split(self.recipe.batch.accumulation)
        return self._fed(parts, self.recipe.plan.microbatches, front=(len(parts),))

    def part_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `parts` would give, without the numbers: enough to compile for."""
        batch, plan = self.recipe.batch, self.recipe.plan
        front = (batch.accumulation,) if plan.pipe == 1 else (batch.accumulation, plan.microbatches)
        rows = (*front, batch.global_examples // math.prod(front))
        axes = (*("microbatch",) * len(front), "batch")
        whole = (*rows, self.recipe.data.sequence_tokens)
        return {
            f: self.layout.shape(rows if f == "rows" else whole, axes, np.int32)
            for f in Batch.__dataclass_fields__
        }

    def _fed(self, parts: Sequence[Batch], microbatches: int, *, front: tuple[int, ...]) -> Weights:
        front = front if self.recipe.plan.pipe == 1 else (*front, microbatches)
        axes = (*("microbatch",) * len(front), "batch")
        fed = {}
        for f in Batch.__dataclass_fields__:
            array = np.stack([getattr(part, f) for part in parts])
            fed[f] = self.layout.feed(array.reshape(*front, -1, *array.shape[2:]), axes)
        return fed

    def fed_constants(self) -> Weights:
        """The method's constants on the devices, those of a stack where its layers are."""
        return {
            name: self.layout.feed(value, ("stage",) if is_stacked(name) else ())
            for name, value in self.constants.items()
        }

    def load(self, rows: Iterable[tuple[Param, WeightLike]], part: Part, dtype: DTypeLike) -> Weights:
        """Native arrays of canonical rows, each device reading what it holds of that part of the state."""
        return from_canonical(rows, order=self.order, shardings=self.layout.of[part], dtype=dtype)

    def shapes(self, rows: Sequence[Param], part: Part, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """What `load` would give, without the numbers: enough to compile for."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.of[part][name])
            for name, shape in native_shapes(rows, order=self.order).items()
        }

    def canonical(self, native: Weights, rows: Sequence[Param]) -> dict[str, NDArray[Any]]:
        """The rows of a table by canonical name, whole on the host."""
        return to_canonical(native, rows, order=self.order)

    def load_trained(self, rows: Iterable[tuple[Param, WeightLike]]) -> tuple[Weights, Weights]:
        """What is computed with, and the masters where those are something else."""
        if self.stored_dtype == self.compute_dtype:
            return self.load(rows, "weights", self.stored_dtype), {}
        master = self.load(rows, "optimizer", self.stored_dtype)
        return jax.jit(self._copy)(master), master

    def no_moments(self, stored: Weights) -> Moments:
        """Zeros, where the optimizer's part of the state is."""
        return jax.jit(lambda weights: self._placed(self.optimizer.init(weights)))(stored)

    def _in_use(self, weights: Weights, slots: Weights, piece: Array | None = None) -> Llama:
        """The model with these weights: a trained one has a slot, and all have their places; constants are as they are.

        `piece` [L] says which of its pieces each layer of a stack is, where a stack has several.
        """

        def leaf(name: str) -> Any:
            which = piece if is_stacked(name) else None
            if name in self.constants:
                return weights[name] if which is None else jax.vmap(chosen)(weights[name], which)
            place = self.layout.place(name, is_trained=name in slots, dtype=self.reduce_dtype)
            return Weight(weights[name], slots.get(name), which, place)

        template = nnx.to_flat_state(self._template)
        values = [(path, variable.replace(leaf(".".join(map(str, path))))) for path, variable in template]
        return nnx.merge(self._definition, nnx.from_flat_state(values))

    def _evaluate(self, weights: Weights, batch: Weights) -> tuple[Array, Array]:
        return self._passes.evaluate(weights, all_rows(batch, self.recipe.method))

    def _logits(self, weights: Weights, batch: Weights) -> Array:
        rows = self._passes.logits(weights, all_rows(batch, self.recipe.method))
        return rows[:, leading_rows(self.recipe.method) :]

    def _gradients(
        self, trainable: Weights, frozen: Weights, stacked: Weights, step: Array, *, listen: bool
    ) -> Found:
        """Everything up to the norm, over the global batch; `stacked` has the parts of accumulation in front."""
        weights, stacked = trainable | frozen, all_rows(stacked, self.recipe.method)
        nothing = {name: jnp.zeros(w.shape, self.reduce_dtype) for name, w in trainable.items()}
        slots = constrained(nothing, self.layout.of["gradients"])

        def add(
            totals: tuple[Array, Array, Weights], batch: Weights
        ) -> tuple[tuple[Array, Array, Weights], tuple[Weights, Weights]]:
            passed = self._passes.gradients(weights, slots, batch, step, listen=listen)
            loss_sum, tokens, gradients, seen, by_probe = passed
            sums = jax.tree.map(jnp.add, totals[2], gradients)
            sums = constrained(sums, self.layout.of["gradients"])
            return (totals[0] + loss_sum, totals[1] + tokens, sums), (seen, by_probe)

        start = (jnp.zeros((), wide(self.compute_dtype)), jnp.zeros((), int), slots)
        (loss_sum, tokens, sums), (seen, by_probe) = lax.scan(add, start, stacked)
        gradients, by_probe = jax.tree.map(lambda g: _mean(g, tokens), (sums, by_probe))
        gradients = constrained(gradients, self.layout.of["gradients"])
        return Found(loss_sum, tokens, global_norm(gradients), gradients, seen, by_probe)

    def _update(
        self,
        trainable: Weights,
        master: Weights,
        moments: Moments,
        gradients: Weights,
        norm: Array,
        scalars: Rates,
    ) -> tuple[Weights, Weights, Moments]:
        """Each device updates the part of weights and moments that it holds moments of."""
        part = self.layout.of["optimizer"]
        gradients = constrained({n: g.astype(self.stored_dtype) for n, g in gradients.items()}, part)
        if self.recipe.optimizer.clip_norm is not None:
            gradients = clip(gradients, norm, max_norm=self.recipe.optimizer.clip_norm)
        stored = constrained(master or trainable, part)
        deltas, next_moments = self.optimizer.update(gradients, moments, stored, rates=scalars)
        stored = constrained(jax.tree.map(jnp.add, stored, deltas), part)
        return self._copy(stored), stored if master else {}, self._placed(next_moments)

    def _placed(self, moments: optax.OptState) -> Moments:
        moment1, moment2 = (constrained(m, self.layout.of["optimizer"]) for m in cast(Moments, moments))
        return Moments(moment1, moment2)

    def _copy(self, stored: Weights) -> Weights:
        """What is computed with: cast where it lies, then gathered, so that the narrower type travels."""
        cast_ = {name: w.astype(self.compute_dtype) for name, w in stored.items()}
        return constrained(constrained(cast_, self.layout.of["optimizer"]), self.layout.of["weights"])


def _mean(total: Array, count: Array) -> Array:
    """total / count in the total's type; a count would be rounded to bfloat16 before it divides."""
    return (total.astype(wide(total.dtype)) / count).astype(total.dtype)
