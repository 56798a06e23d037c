"""The stages of a pipeline as a dimension of ordinary arrays, and which work each stage does when.

That dimension is sharded over the mesh axis `pipe`: stages compute under `vmap`, and activations move between them by
`roll`, which the compiler turns into sends between neighbours. So a pipeline is one more loop of the same program
(`passes.py`): the compiler handles the other axes as before, and autodiff works. An idle stage computes on stale values;
the result is discarded.

S stages, V model chunks on each, K slots for layers in a chunk, L layers, M microbatches of B examples, T positions, E embed.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.activations import NO_PROBES, Probes, recording, zero_probes
from jaxtrain.decoder import Decoder, rotated_layers
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import VirtualTokens
from jaxtrain.loss_chunks import head_loss
from jaxtrain.sharding import Shardings
from jaxtrain.weight_ops import select_chunk
from jaxtrain.weights import Arrays, is_stacked
from trainspec.data import IGNORED
from trainspec.methods import ENCODER
from trainspec.model import ModelSpec
from trainspec.plans.pipeline import Timeline, Work, stack_order
from trainspec.plans.plan import Plan

# An index, or an array of them.
N = TypeVar("N", int, Array, NDArray[np.int64])


def forward_work(plan: Plan, tick: N, stage: N) -> tuple[N, N]:
    """Microbatch and model chunk of a stage's forward pass in a tick; if there is no such microbatch, the stage is idle.

    Microbatches go round the stages in groups of S: a whole group passes a stage's first chunk, then its second. So the
    first stage gets a microbatch back just when the last stage has handed it on.
    """
    since_start = tick - stage
    group, within = (
        since_start // (plan.pipe * plan.chunks_per_stage),
        since_start % (plan.pipe * plan.chunks_per_stage),
    )
    return group * plan.pipe + within % plan.pipe, within // plan.pipe


def backward_work(plan: Plan, tick: N, stage: N) -> N:
    """Microbatch of a stage's backward pass in a tick of `1f1b`; if there is no such microbatch, the stage is idle."""
    return tick - 2 * (plan.pipe - 1) + stage


def forward_tick(plan: Plan, microbatch: N, chunk: N | int, stage: N | int) -> N:
    """The tick in which a stage makes that forward pass: the inverse of `forward_work`."""
    group, within = microbatch // plan.pipe, microbatch % plan.pipe
    return (group * plan.chunks_per_stage + chunk) * plan.pipe + within + stage


def backward_tick(plan: Plan, microbatch: N, stage: N | int) -> N:
    """The tick of `1f1b` in which a stage makes that backward pass: the inverse of `backward_work`."""
    return microbatch + 2 * (plan.pipe - 1) - stage


def num_ticks(plan: Plan, microbatches: int, *, backward: bool) -> int:
    """The length of the loop over forward passes, or with `backward` of that over both kinds in `1f1b`."""
    if backward:
        return backward_tick(plan, microbatches - 1, 0) + 1
    return forward_tick(plan, microbatches - 1, plan.chunks_per_stage - 1, plan.pipe - 1) + 1


def timeline(plan: Plan, microbatches: int) -> Timeline:
    """What each stage does in each slot of time, from the functions that the loops use."""

    def forward(tick: int, stage: int) -> Work | None:
        microbatch, chunk = forward_work(plan, tick, stage)
        return Work("forward", microbatch, chunk) if 0 <= microbatch < microbatches else None

    def backward(tick: int, stage: int) -> Work | None:
        microbatch = backward_work(plan, tick, stage)
        return Work("backward", microbatch) if 0 <= microbatch < microbatches else None

    if plan.schedule == "1f1b":
        ticks = range(num_ticks(plan, microbatches, backward=True))
        return tuple(
            tuple(work(tick, stage) for tick in ticks for work in (forward, backward))
            for stage in range(plan.pipe)
        )
    ticks = range(num_ticks(plan, microbatches, backward=False))
    passes = [[forward(tick, stage) for tick in ticks] for stage in range(plan.pipe)]
    # Autodiff goes through the loop from its end.
    return tuple(
        (*works, *(work and Work("backward", work.microbatch, work.chunk) for work in reversed(works)))
        for works in passes
    )


class ModelFactory(Protocol):
    """Binds weights and gradient placeholders, by native name, to the model."""

    def __call__(self, weights: Arrays, grad_placeholders: Arrays, chunk: Array | None = None) -> Decoder:
        """The model; `chunk` [K] is given if the stacks have several model chunks after the layers."""
        ...


NO_TOKENS = VirtualTokens()


class Recorded(NamedTuple):
    """Arrays by point, such as probes: those of the embedding, of the layers, and of the head."""

    embedding: Probes = NO_PROBES
    layers: Probes = NO_PROBES
    head: Probes = NO_PROBES

    def all(self) -> Arrays:
        """The arrays of all three."""
        return {name: array for part in self for name, array in (part or {}).items()}


class Inputs(NamedTuple):
    """What passes compute with: weights, the batch [M, B, ...], and the step (None without dropout).

    `virtual` are the virtual tokens that `Stages.encode` makes: one more input that has a gradient.
    """

    weights: Arrays
    batch: Arrays
    step: Array | None
    virtual: VirtualTokens = NO_TOKENS

    def dropout_point(self, examples: Array) -> DropoutPoint | None:
        """Where in the run a pass over these examples is."""
        return None if self.step is None else DropoutPoint(self.step, examples)


class Stages:
    """The computations of a pipeline's stages. Every stage has the embedding, the final norm and the head."""

    def __init__(
        self, plan: Plan, spec: ModelSpec, shardings: Shardings, bind_weights: ModelFactory, dtype: DTypeLike
    ) -> None:
        self.plan, self.shardings, self.dtype = plan, shardings, jnp.dtype(dtype)
        self._spec, self._bind_weights = spec, bind_weights
        order = stack_order(plan, spec.layers)
        self._stack_shape = (
            plan.pipe,
            len(order) // (plan.pipe * plan.chunks_per_stage),
            plan.chunks_per_stage,
        )
        positions = np.array([order.index(layer) for layer in range(spec.layers)])
        # The stage of each layer, its slot there, and its model chunk, [L] each.
        self.stage_of, self.slot_of, self.chunk_of = np.unravel_index(positions, self._stack_shape)
        is_layer = np.array([layer is not None for layer in order])
        self._is_layer = None if is_layer.all() else is_layer
        self._is_rotated = rotated_layers(spec, order)

    def encode(self, grad_placeholders: Arrays, inputs: Inputs) -> Inputs:
        """`inputs` with the virtual tokens, which all microbatches share."""
        model = self._bind_weights(inputs.weights, grad_placeholders)
        return inputs._replace(virtual=model.virtual(inputs.step))

    def embed(
        self, grad_placeholders: Arrays, probes: Probes, inputs: Inputs, microbatch: Array
    ) -> tuple[Array, Arrays]:
        """The first layer's input [B, T, E] of a microbatch, and recorded activations."""
        model = self._bind_weights(inputs.weights, grad_placeholders)
        with recording(probes) as recorded:
            return model.embed(inputs.batch["input_ids"][microbatch], inputs.virtual), recorded

    def run(
        self,
        grad_placeholders: Arrays,
        x_SBTE: Array,
        probes: Probes,
        inputs: Inputs,
        microbatch_S: Array,
        chunk_S: Array | None = None,
    ) -> tuple[Array, Arrays]:
        """Every stage's layers applied to its input, each of its own microbatch; and recorded activations [S, K, ...]."""
        layers, ends = layers_and_ends(inputs.weights)
        flags = (self._is_layer, self._is_rotated)
        stacks = (layers, layers_and_ends(grad_placeholders)[0], flags, inputs.virtual.prefix)
        stage_stacks = jax.tree.map(self._by_stage, stacks)
        batch = {
            name: self._of_stages(inputs.batch[name], microbatch_S)
            for name in ("positions", "segments", "rows")
        }

        def run_stage(
            x_BTE: Array, stacks: Any, batch: Arrays, chunk: Array | None, probes: Probes
        ) -> tuple[Array, Arrays]:
            layers, grad_placeholders, *rest = stacks
            if chunk is not None:
                chunk = jnp.broadcast_to(chunk, self._stack_shape[1:2])
                rest = jax.tree.map(lambda chunks: jax.vmap(select_chunk)(chunks, chunk), rest)
            (is_layer, is_rotated), prefix = rest
            x_BTE, recorded, _ = self._bind_weights(ends | layers, grad_placeholders, chunk).blocks(
                x_BTE,
                VirtualTokens(prefix=prefix),
                positions=batch["positions"],
                segments=batch["segments"],
                point=inputs.dropout_point(batch["rows"]),
                probes=probes,
                is_layer=is_layer,
                is_rotated=is_rotated,
            )
            return x_BTE, recorded

        # In 1f1b nothing but a stage's input is kept anyway.
        if self.plan.remat == "full" and self.plan.schedule != "1f1b":
            run_stage = jax.checkpoint(run_stage, prevent_cse=False)
        chunk_S = chunk_S if self.plan.chunks_per_stage > 1 else None
        x_SBTE, recorded = jax.vmap(run_stage, spmd_axis_name="pipe")(
            x_SBTE, stage_stacks, batch, chunk_S, probes
        )
        return self.constrain(x_SBTE, "stage"), recorded

    def loss(
        self,
        grad_placeholders: Arrays,
        x_BTE: Array,
        probes: Probes,
        inputs: Inputs,
        microbatch: Array,
        is_work: Array | bool = True,
    ) -> tuple[Array, tuple[Array, Arrays]]:
        """Loss sum of a microbatch from its last layer's output; its target tokens, and recorded activations.

        Without `is_work` it has no target tokens.
        """
        batch = inputs.batch
        point = inputs.dropout_point(batch["rows"][microbatch])
        labels_BT = jnp.where(is_work, batch["labels"][microbatch], IGNORED)
        model = self._bind_weights(inputs.weights, grad_placeholders)
        with recording(probes) as recorded:
            loss_sum, tokens = head_loss(model, self.constrain(x_BTE), labels_BT, point, self.plan)
        return loss_sum, (tokens, recorded)

    def logits(
        self, grad_placeholders: Arrays, x_BTE: Array, inputs: Inputs, point: DropoutPoint | None
    ) -> Array:
        """The model's output [B, T, vocab] from its last layer's."""
        return self._bind_weights(inputs.weights, grad_placeholders).head(self.constrain(x_BTE), point)

    def hand_on(self, x_SBTE: Array, outside_BTE: Array, from_outside_S: Array, *, by: int) -> Array:
        """Each stage's next input: what the stage `by` before it gives, or `outside_BTE` if its `from_outside_S` is true."""
        neighbours = jnp.roll(x_SBTE, by, axis=0)
        given = jnp.where(from_outside_S[:, None, None, None], outside_BTE, neighbours)
        return self.constrain(given, "stage")

    def constrain(self, x: Array, *leading: str) -> Array:
        """Shard an activation [leading..., B, T, E]. Without it the compiler replicates what is carried over ticks."""
        return self.shardings.constrain(x, (*leading, "batch", "seq", "embed"))

    def zeros(self, batch: Arrays, *leading: tuple[str, int]) -> Array:
        """Zeros for activations of microbatches, with the named dimensions in front."""
        _, B, T = batch["positions"].shape
        shape = (*(size for _, size in leading), B, T, self._spec.embed)
        return self.constrain(jnp.zeros(shape, self.dtype), *(name for name, _ in leading))

    def probes(self, inputs: Inputs) -> Recorded:
        """Probes for one tick, those of layers [S, K, B, ...]."""
        first, every = jnp.zeros((), int), jnp.zeros(self.plan.pipe, int)

        def record() -> Recorded:
            x_BTE, embedding = self.embed({}, None, inputs, first)
            x_SBTE = jnp.broadcast_to(x_BTE, (self.plan.pipe, *x_BTE.shape))
            x_SBTE, layers = self.run({}, x_SBTE, None, inputs, every, every)
            _, (_, head) = self.loss({}, x_SBTE[-1], None, inputs, first)
            return Recorded(embedding, layers, head)

        return zero_probes(record)

    def in_order(
        self, recorded: Recorded, *, layer_ticks_LM: NDArray[np.int64], embedding_ticks_M: NDArray[np.int64]
    ) -> Arrays:
        """Recorded activations in the order of examples, [M B, ...], those of layers [L, M B, ...].

        They were recorded as [ticks, S, K, B, ...] in layers, as [ticks, B, ...] at the embedding, and as [M, B, ...] at the
        head. The ticks are those of each layer's, and of the embedding's, M microbatches.
        """

        def of_layers(array: Array) -> Array:
            array_LMB = array[layer_ticks_LM, self.stage_of[:, None], self.slot_of[:, None]]
            return array_LMB.reshape(len(array_LMB), -1, *array_LMB.shape[3:])

        def of_ends(array_MB: Array) -> Array:
            return array_MB.reshape(-1, *array_MB.shape[2:])

        embedding, layers, head = recorded
        embedding = jax.tree.map(lambda array: of_ends(array[embedding_ticks_M]), embedding)
        return Recorded(embedding, jax.tree.map(of_layers, layers), jax.tree.map(of_ends, head)).all()

    def _by_stage(self, stack: Array) -> Array:
        """A stack of layers as [S, K, ...], as [S, K, V, ...] if a stage has several model chunks."""
        cut = self._stack_shape if self.plan.chunks_per_stage > 1 else self._stack_shape[:-1]
        return stack.reshape(*cut, *stack.shape[1:])

    def _of_stages(self, array_MB: Array, microbatch_S: Array) -> Array:
        """A field of the batch, [S, B, ...]: that of each stage's microbatch."""
        return self.shardings.constrain(array_MB[microbatch_S], ("stage", "batch", "seq")[: array_MB.ndim])


def layers_and_ends(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """Native arrays that are stacks of layers, and the others."""
    layers = {name: array for name, array in arrays.items() if is_stacked(name)}
    return layers, {name: array for name, array in arrays.items() if name not in layers}


def of_encoder(arrays: Arrays) -> Arrays:
    """The native arrays that make virtual tokens."""
    return {name: array for name, array in arrays.items() if name.startswith(f"{ENCODER}.")}
