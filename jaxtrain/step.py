"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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

from jaxtrain.activations import by_point, zero_probes
from jaxtrain.dropout import DropoutPoint
from jaxtrain.loss import token_loss
from jaxtrain.methods import attach
from jaxtrain.model import build_model, wide
from jaxtrain.optim import Moments, Rates, Weights, clip, global_norm, make_optimizer, rates
from jaxtrain.parallel import Layout, constrained, make_mesh
from jaxtrain.tensor import Weight
from jaxtrain.weights import from_canonical, native_name, to_canonical, to_host
from trainspec.checkpoint import Checkpoint
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.loop import Metrics
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param
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
    frozen |= {name: program.layout.feed(value, ()) for name, value in program.constants.items()}
    trainable, master = program.load_trained((p, w) for p, w, trains in rows if trains)
    return State(0, trainable, frozen, master, program.no_moments(master or trainable), program)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    program = state.program
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    stacked, step = program.microbatches(batch), jnp.int32(state.step)
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
    metrics = replace(metrics, gradients=to_canonical(found.gradients, program.trainable_rows))
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
    return to_canonical(state.frozen | (state.master or state.trainable), table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    rows = state.program.trainable_rows
    return to_canonical(state.moments.moment1, rows), to_canonical(state.moments.moment2, rows)


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
        self.layout = Layout(mesh, recipe.plan, full_table(spec, recipe.method))
        model = build_model(spec, policy=policy, remat=recipe.plan.remat, constrain=self.layout.constrain)
        self.constants = attach(model, spec, recipe.method, seed=recipe.run.seed)
        self._definition, self._template = nnx.split(model)
        decayed = frozenset(native_name(p)[0] for p in self.trainable_rows if p.decay)
        self.optimizer = make_optimizer(recipe.optimizer, decayed)
        self.gradients = jax.jit(self._gradients, static_argnames="listen", keep_unused=True)
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2), keep_unused=True)
        self.evaluate = jax.jit(self._evaluate)
        self.logits = jax.jit(lambda w, batch: self._forward(self._in_use(w), batch)[0])

    def feed(self, batch: Batch) -> Weights:
        """The arrays of a batch, their rows split over the replicas."""
        return {f: self.layout.feed(getattr(batch, f), ("batch",)) for f in Batch.__dataclass_fields__}

    def microbatches(self, batch: Batch) -> Weights:
        """The same with the microbatches in front, the rows of each of them split over the replicas."""
        parts = batch.split(self.recipe.batch.accumulation)
        return {
            f: self.layout.feed(np.stack([getattr(part, f) for part in parts]), ("microbatch", "batch"))
            for f in Batch.__dataclass_fields__
        }

    def load(self, rows: Iterable[tuple[Param, WeightLike]], part: Part, dtype: DTypeLike) -> Weights:
        """Native arrays of canonical rows, each device reading what it holds of that part of the state."""
        return from_canonical(rows, layers=self.spec.layers, shardings=self.layout.of[part], dtype=dtype)

    def load_trained(self, rows: Iterable[tuple[Param, WeightLike]]) -> tuple[Weights, Weights]:
        """What is computed with, and the masters where those are something else."""
        if self.stored_dtype == self.compute_dtype:
            return self.load(rows, "weights", self.stored_dtype), {}
        master = self.load(rows, "optimizer", self.stored_dtype)
        return jax.jit(self._copy)(master), master

    def no_moments(self, stored: Weights) -> Moments:
        """Zeros, where the optimizer's part of the state is."""
        return jax.jit(lambda weights: self._placed(self.optimizer.init(weights)))(stored)

    def _in_use(self, weights: Weights, slots: Weights | None = None) -> dict[str, Any]:
        """What the model is merged with: a weight, its slot if it is trained, and its place; constants as they are."""
        slots = slots or {}
        return {
            name: array
            if name in self.constants
            else Weight(
                array,
                slots.get(name),
                self.layout.place(name, is_trained=name in slots, dtype=self.reduce_dtype),
            )
            for name, array in weights.items()
        }

    def _forward(
        self,
        weights: Mapping[str, Any],
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

    def _evaluate(self, weights: Weights, batch: Weights) -> tuple[Array, Array]:
        return token_loss(self._forward(self._in_use(weights), batch)[0], batch["labels"])

    def _gradients(
        self, trainable: Weights, frozen: Weights, stacked: Weights, step: Array, *, listen: bool
    ) -> Found:
        """Everything up to the norm, over the global batch; `stacked` has the microbatches in front."""
        _, B, S = stacked["input_ids"].shape
        probes = zero_probes(self.spec, (B, S), self.compute_dtype) if listen else {}
        nothing = {name: jnp.zeros(w.shape, self.reduce_dtype) for name, w in trainable.items()}
        slots = constrained(nothing, self.layout.of["gradients"])

        def loss(slots: Weights, probes: Weights, batch: Weights) -> tuple[Array, tuple[Array, Weights]]:
            point = DropoutPoint(step, batch["rows"])
            weights = self._in_use(trainable | frozen, slots)
            logits, seen = self._forward(weights, batch, point, probes)
            loss_sum, tokens = token_loss(logits, batch["labels"])
            return loss_sum, (tokens, seen)

        def add(
            totals: tuple[Array, Array, Weights], batch: Weights
        ) -> tuple[tuple[Array, Array, Weights], tuple[Weights, Weights]]:
            (loss_sum, (tokens, seen)), (gradients, by_probe) = jax.value_and_grad(
                loss, argnums=(0, 1), has_aux=True
            )(slots, probes, batch)
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
