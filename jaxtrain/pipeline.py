"""The stages of a pipeline as a dimension of ordinary arrays, and which work each of them does when.

That dimension is split over the mesh axis `pipe`: a stage computes under `vmap`, and what it hands on is moved by `roll`,
which the compiler makes a send between neighbours. So a pipeline is one more loop of the same program (`passes.py`), every
other axis is the compiler's as before, and autodiff works. A stage that has nothing to do in a tick of the loop computes
with numbers that are there, and nothing of it is kept.

S stages, V pieces of the model on each, K places for layers in a piece, M microbatches of B rows, T positions, E embed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.activations import Probes, Tap, zero_probes
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import VirtualTokens
from jaxtrain.loss import token_loss
from jaxtrain.sharding import Shardings
from jaxtrain.weight_ops import select_chunk
from jaxtrain.weights import Arrays, is_stacked
from trainspec.data import IGNORED
from trainspec.methods import ENCODER
from trainspec.model import ModelSpec
from trainspec.plans.pipeline import Timeline, Work, stack_order
from trainspec.plans.plan import Plan
from trainspec.trace import LAYER_POINTS

# Points after the last layer.
HEAD_POINTS = ("norm", "logits")
# A number, or many.
N = TypeVar("N", int, Array, NDArray[np.int64])


def forward_work(plan: Plan, tick: N, stage: N) -> tuple[N, N]:
    """Microbatch and piece of the forward pass that a stage makes in a tick; no such microbatch: it waits.

    Microbatches go round the stages in groups of S: all of a group through a stage's first piece, then all through its
    second. So the first stage gets a microbatch back just when the last stage has handed it on.
    """
    at = tick - stage
    group, within = at // (plan.pipe * plan.pieces), at % (plan.pipe * plan.pieces)
    return group * plan.pipe + within % plan.pipe, within // plan.pipe


def backward_work(plan: Plan, tick: N, stage: N) -> N:
    """The microbatch of which a stage makes the backward pass in a tick of `1f1b`."""
    return tick - 2 * (plan.pipe - 1) + stage


def forward_tick(plan: Plan, microbatch: N, piece: N, stage: N) -> N:
    """The tick in which a stage makes that forward pass: `forward_work` the other way round."""
    group, within = microbatch // plan.pipe, microbatch % plan.pipe
    return (group * plan.pieces + piece) * plan.pipe + within + stage


def backward_tick(plan: Plan, microbatch: N, stage: N | int) -> N:
    """The tick of `1f1b` in which a stage makes that backward pass."""
    return microbatch + 2 * (plan.pipe - 1) - stage


def num_ticks(plan: Plan, microbatches: int, *, backward: bool) -> int:
    """How many ticks a loop has: of forward passes, or of both kinds in `1f1b`."""
    if backward:
        return backward_tick(plan, microbatches - 1, 0) + 1
    return forward_tick(plan, microbatches - 1, plan.pieces - 1, plan.pipe - 1) + 1


def timeline(plan: Plan, microbatches: int) -> Timeline:
    """What each stage does in each slot, by the functions that the loops go by."""

    def forward(tick: int, stage: int) -> Work | None:
        microbatch, piece = forward_work(plan, tick, stage)
        return Work("forward", microbatch, piece) if 0 <= microbatch < microbatches else None

    def backward(tick: int, stage: int) -> Work | None:
        microbatch = backward_work(plan, tick, stage)
        return Work("backward", microbatch) if 0 <= microbatch < microbatches else None

    if plan.schedule == "1f1b":
        ticks = range(num_ticks(plan, microbatches, backward=True))
        return tuple(
            tuple(slot(tick, stage) for tick in ticks for slot in (forward, backward))
            for stage in range(plan.pipe)
        )
    ticks = range(num_ticks(plan, microbatches, backward=False))
    rows = [[forward(tick, stage) for tick in ticks] for stage in range(plan.pipe)]
    # Autodiff goes through the loop from its end.
    return tuple(
        (*row, *(work and Work("backward", work.microbatch, work.piece) for work in reversed(row)))
        for row in rows
    )


class Merge(Protocol):
    """Gives the model with weights, and with slots for those that are trained (`weight_ops.BoundWeight`), by native name."""

    def __call__(self, weights: Arrays, slots: Arrays, piece: Array | None = None) -> Decoder:
        """`piece` [K] for stacks that have several pieces after the layers."""
        ...


NO_TOKENS = VirtualTokens()


class Inputs(NamedTuple):
    """What passes compute with: weights, the batch [M, B, ...], and the step, which is None where there is no dropout.

    `virtual` are the virtual tokens once `Stages.encoded` has made them: one input more, with a gradient.
    """

    weights: Arrays
    batch: Arrays
    step: Array | None
    virtual: VirtualTokens = NO_TOKENS

    def point(self, rows: Array) -> DropoutPoint | None:
        """Where in the run a pass over these rows is."""
        return None if self.step is None else DropoutPoint(self.step, rows)


class Stages:
    """The model's way in, its stages, and its way out. Embedding, final norm and head are on every stage."""

    def __init__(
        self, plan: Plan, spec: ModelSpec, shardings: Shardings, merge: Merge, dtype: DTypeLike
    ) -> None:
        self.plan, self.shardings, self.dtype = plan, shardings, jnp.dtype(dtype)
        self._spec, self._merge = spec, merge
        order = stack_order(plan, spec.layers)
        self._place_of = np.array([order.index(layer) for layer in range(spec.layers)])
        self._cut = (plan.pipe, len(order) // (plan.pipe * plan.pieces), plan.pieces)
        is_layer = np.array([layer is not None for layer in order])
        self._is_layer = None if is_layer.all() else is_layer

    def encoded(self, slots: Arrays, inputs: Inputs) -> Inputs:
        """`inputs` with the virtual tokens, which are those of all microbatches."""
        return inputs._replace(virtual=self._merge(inputs.weights, slots).virtual(inputs.step))

    def enter(self, slots: Arrays, inputs: Inputs, microbatch: Array, tap: Tap) -> Array:
        """What the first layer is given of a microbatch, [B, T, E]."""
        return self._merge(inputs.weights, slots).embed(
            inputs.batch["input_ids"][microbatch], inputs.virtual, tap
        )

    def run(
        self,
        slots: Arrays,
        x_SBTE: Array,
        probes: Probes,
        inputs: Inputs,
        microbatch: Array,
        piece: Array | None = None,
    ) -> tuple[Array, Arrays]:
        """Every stage's pass over its piece, each with a microbatch of its own; and what was seen, [S, K, ...]."""
        layers, ends = layers_and_ends(inputs.weights)
        stacks = (layers, layers_and_ends(slots)[0], self._is_layer, inputs.virtual.prefix)
        own = jax.tree.map(self._by_stage, stacks)
        rows = {
            name: self._of_stages(inputs.batch[name], microbatch)
            for name in ("positions", "segments", "rows")
        }

        def stage(
            x_BTE: Array, own: Any, rows: Arrays, piece: Array | None, probes: Probes
        ) -> tuple[Array, Arrays]:
            layers, slots, *rest = own
            if piece is not None:
                piece = jnp.broadcast_to(piece, self._cut[1:2])
                rest = jax.tree.map(lambda pieces: jax.vmap(select_chunk)(pieces, piece), rest)
            is_layer, prefix = rest
            return self._merge(ends | layers, slots, piece).blocks(
                x_BTE,
                VirtualTokens(prefix=prefix),
                positions=rows["positions"],
                segments=rows["segments"],
                point=inputs.point(rows["rows"]),
                probes=probes,
                is_layer=is_layer,
            )

        # In 1f1b a stage's input is all that is kept anyway.
        if self.plan.remat == "full" and self.plan.schedule != "1f1b":
            stage = jax.checkpoint(stage, prevent_cse=False)
        which = piece if self.plan.pieces > 1 else None
        x_SBTE, seen = jax.vmap(stage, spmd_axis_name="pipe")(x_SBTE, own, rows, which, probes)
        return self.constrain(x_SBTE, "stage"), seen

    def leave(
        self,
        slots: Arrays,
        x_BTE: Array,
        probes: Probes,
        inputs: Inputs,
        microbatch: Array,
        is_work: Array | bool = True,
    ) -> tuple[Array, tuple[Array, Arrays]]:
        """Loss sum of a microbatch, from what its last layer gave; its tokens (none if it is no work), and what was seen."""
        tap, batch = Tap(probes), inputs.batch
        logits = self.logits(slots, x_BTE, inputs, inputs.point(batch["rows"][microbatch]), tap)
        loss_sum, tokens = token_loss(logits, jnp.where(is_work, batch["labels"][microbatch], IGNORED))
        return loss_sum, (tokens, tap.seen)

    def logits(
        self, slots: Arrays, x_BTE: Array, inputs: Inputs, point: DropoutPoint | None, tap: Tap
    ) -> Array:
        """The model's output [B, T, vocab], from what its last layer gave."""
        return self._merge(inputs.weights, slots).head(self.constrain(x_BTE), point, tap)

    def handed_on(self, x_SBTE: Array, outside_BTE: Array, from_outside: Array, *, by: int) -> Array:
        """What each stage is given: that of the stage `by` before it, or `outside_BTE`."""
        neighbours = jnp.roll(x_SBTE, by, axis=0)
        given = jnp.where(from_outside[:, None, None, None], outside_BTE, neighbours)
        return self.constrain(given, "stage")

    def constrain(self, x: Array, *front: str) -> Array:
        """An activation [front, B, T, E]. Left alone, the compiler repeats on every replica what is kept over ticks."""
        return self.shardings.constrain(x, (*front, "batch", "seq", "embed"))

    def zeros(self, batch: Arrays, *front: tuple[str, int]) -> Array:
        """Room for activations of microbatches, in front the named dimensions."""
        _, B, T = batch["positions"].shape
        shape = (*(size for _, size in front), B, T, self._spec.embed)
        return self.constrain(jnp.zeros(shape, self.dtype), *(name for name, _ in front))

    def probes(self, batch: Arrays) -> dict[str, Array]:
        """Probes for one tick, those of layers [S, K, B, T, E]."""
        _, B, T = batch["positions"].shape
        S, K, _ = self._cut
        probes = zero_probes(replace(self._spec, layers=K), (B, T), self.dtype)
        return {
            point: jnp.zeros((S, *probe.shape), self.dtype) if point in LAYER_POINTS else probe
            for point, probe in probes.items()
        }

    def in_order(self, recorded: Arrays, tick_of: Callable[[Any, Any], NDArray[np.int64]]) -> Arrays:
        """What was recorded, by layer and row; `tick_of(stage, piece)` are the ticks of the M microbatches.

        Layers and embedding are recorded for every tick, the points of the head for every microbatch.
        """
        stage, place, piece = (at[:, None] for at in np.unravel_index(self._place_of, self._cut))
        found = {}
        for point, array in recorded.items():
            if point in LAYER_POINTS:
                array = array[tick_of(stage, piece), stage, place]
                found[point] = array.reshape(len(array), -1, *array.shape[3:])
            else:
                array = array if point in HEAD_POINTS else array[tick_of(0, 0)]
                found[point] = array.reshape(-1, *array.shape[2:])
        return found

    def _by_stage(self, stack: Array) -> Array:
        """A stack of layers as [S, K, ...], where a stage has several pieces as [S, K, V, ...]."""
        cut = self._cut if self.plan.pieces > 1 else self._cut[:-1]
        return stack.reshape(*cut, *stack.shape[1:])

    def _of_stages(self, array: Array, microbatch: Array) -> Array:
        """What belongs to each stage's microbatch."""
        return self.shardings.constrain(array[microbatch], ("stage", "batch", "seq")[: array.ndim])


def layers_and_ends(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """Native arrays that are stacks of layers, and those that are not."""
    layers = {name: array for name, array in arrays.items() if is_stacked(name)}
    return layers, {name: array for name, array in arrays.items() if name not in layers}


def of_encoder(arrays: Arrays) -> Arrays:
    """Those native arrays that make virtual tokens."""
    return {name: array for name, array in arrays.items() if name.startswith(f"{ENCODER}.")}
