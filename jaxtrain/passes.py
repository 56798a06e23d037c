"""How a part of the batch goes through the model, forward and backward: whole, or through the stages of a pipeline.

All three give the same numbers. `Pipelined` is one loop of forward passes, differentiated; `Lockstep` makes its gradients
itself, so that what it keeps depends on the number of stages alone. Dimensions are named as in `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.activations import Probes, Tap, zero_probes
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import VirtualTokens
from jaxtrain.loss import token_loss
from jaxtrain.pipeline import (
    HEAD_POINTS,
    Inputs,
    Merge,
    Stages,
    backward_tick,
    backward_work,
    forward_tick,
    forward_work,
    layers_and_ends,
    num_ticks,
    of_encoder,
)
from jaxtrain.precision import accumulation_dtype
from jaxtrain.sharding import Shardings, constrain_all
from jaxtrain.weight_ops import select_chunk
from jaxtrain.weights import Arrays
from trainspec.model import ModelSpec
from trainspec.plans.plan import Plan
from trainspec.trace import LAYER_POINTS


class Passed(NamedTuple):
    """What a forward and a backward pass over a part of the batch give; gradients are those of the summed loss."""

    loss_sum: Array
    tokens: Array
    gradients: Arrays
    activations: Arrays
    activation_gradients: Arrays


class Whole:
    """The model in one piece, the rows of a part at a time: batches are [B, T], but for the ids (`methods.virtual_tokens`)."""

    def __init__(self, spec: ModelSpec, merge: Merge, dtype: DTypeLike) -> None:
        self._spec, self._merge, self._dtype = spec, merge, dtype

    def logits(self, weights: Arrays, batch: Arrays) -> Array:
        """The model's output [rows, T, vocab], without dropout."""
        return self._forward(weights, {}, batch, None, {})[0]

    def evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        """Loss sum and target tokens, without dropout."""
        return token_loss(self.logits(weights, batch), batch["labels"])

    def gradients(
        self, weights: Arrays, slots: Arrays, batch: Arrays, step: Array, *, listen: bool
    ) -> Passed:
        """Loss and gradients, and on request activations [rows, T, ...] (layers in front) with theirs."""
        B, T = batch["positions"].shape
        probes = zero_probes(self._spec, (B, T), self._dtype) if listen else {}

        def loss(slots: Arrays, probes: Probes) -> tuple[Array, tuple[Array, Arrays]]:
            point = DropoutPoint(step, batch["rows"])
            logits, seen = self._forward(weights, slots, batch, point, probes)
            loss_sum, tokens = token_loss(logits, batch["labels"])
            return loss_sum, (tokens, seen)

        found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(slots, probes)
        (loss_sum, (tokens, seen)), (gradients, by_probe) = found
        return Passed(loss_sum, tokens, gradients, seen, by_probe)

    def _forward(
        self, weights: Arrays, slots: Arrays, batch: Arrays, point: DropoutPoint | None, probes: Probes
    ) -> tuple[Array, Arrays]:
        inputs = {name: batch[name] for name in ("positions", "segments")}
        return self._merge(weights, slots)(batch["input_ids"], **inputs, point=point, probes=probes)


class Pipelined:
    """`gpipe` (arXiv 1811.06965) and `interleaved` (arXiv 2104.04473): autodiff of a loop of forward passes.

    Batches have the microbatches in front: [M, B, T].
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def logits(self, weights: Arrays, batch: Arrays) -> Array:
        """The model's output [rows, T, vocab], without dropout."""
        inputs = self._stages.encoded({}, Inputs(weights, batch, None))
        x_MBTE, _ = self._forward({}, {}, inputs)
        logits = lax.map(lambda x_BTE: self._stages.logits({}, x_BTE, inputs, None, Tap({})), x_MBTE)
        return logits.reshape(-1, *logits.shape[2:])

    def evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        """Loss sum and target tokens, without dropout."""
        loss_sum, (tokens, _) = self._loss({}, {}, Inputs(weights, batch, None))
        return loss_sum, tokens

    def gradients(
        self, weights: Arrays, slots: Arrays, batch: Arrays, step: Array, *, listen: bool
    ) -> Passed:
        """Loss and gradients, and on request activations [rows, T, ...] (layers in front) with theirs."""
        plan, M = self._stages.plan, len(batch["rows"])
        ticks, microbatch = num_ticks(plan, M, backward=False), np.arange(M)
        probes = {
            point: jnp.zeros((M if point in HEAD_POINTS else ticks, *probe.shape), probe.dtype)
            for point, probe in (self._stages.probes(batch) if listen else {}).items()
        }
        found = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)(
            slots, probes, Inputs(weights, batch, step)
        )
        (loss_sum, (tokens, seen)), (gradients, by_probe) = found
        seen, by_probe = (
            self._stages.in_order(recorded, lambda stage, piece: forward_tick(plan, microbatch, piece, stage))
            for recorded in (seen, by_probe)
        )
        return Passed(loss_sum, tokens, gradients, seen, by_probe)

    def _loss(self, slots: Arrays, probes: Probes, inputs: Inputs) -> tuple[Array, tuple[Array, Arrays]]:
        """Loss sum, target tokens and what was seen; the logits of one microbatch are there at a time."""
        inputs = self._stages.encoded(slots, inputs)
        x_MBTE, seen = self._forward(slots, probes, inputs)

        def add(
            totals: tuple[Array, Array], now: tuple[Array, Probes, Array]
        ) -> tuple[tuple[Array, Array], Arrays]:
            x_BTE, probes, microbatch = now
            loss_sum, (tokens, seen) = self._stages.leave(slots, x_BTE, probes, inputs, microbatch)
            return (totals[0] + loss_sum, totals[1] + tokens), seen

        start = (jnp.zeros((), accumulation_dtype(x_MBTE.dtype)), jnp.zeros((), int))
        microbatches = (x_MBTE, probes_at(HEAD_POINTS, probes), jnp.arange(len(x_MBTE)))
        (loss_sum, tokens), head_seen = lax.scan(jax.checkpoint(add, prevent_cse=False), start, microbatches)
        return loss_sum, (tokens, seen | head_seen)

    def _forward(self, slots: Arrays, probes: Probes, inputs: Inputs) -> tuple[Array, Arrays]:
        """What the last layer gives, [M, B, T, E], and what was seen in every tick up to there."""
        stages, plan, M = self._stages, self._stages.plan, len(inputs.batch["rows"])
        numbers = jnp.arange(plan.pipe)

        def tick(carry: tuple[Array, Array], now: tuple[Array, Probes]) -> tuple[tuple[Array, Array], Arrays]:
            (x_SBTE, left_MBTE), (number, probes) = carry, now
            microbatch, piece = forward_work(plan, number, numbers)
            microbatch, tap = jnp.clip(microbatch, 0, M - 1), Tap(probes)
            fresh_BTE = stages.enter(slots, inputs, microbatch[0], tap)
            x_SBTE = stages.handed_on(x_SBTE, fresh_BTE, (numbers == 0) & (piece == 0), by=1)
            x_SBTE, seen = stages.run(
                slots, x_SBTE, probes_at(LAYER_POINTS, probes), inputs, microbatch, piece
            )
            # A microbatch's later piece takes the place of its earlier one; what was no work comes before what was.
            last_BTE = stages.constrain(x_SBTE[-1])
            # Not `.at[].set`: that is a scatter, on its way back a gather, and for it the compiler makes all rows whole.
            left_MBTE = lax.dynamic_update_index_in_dim(left_MBTE, last_BTE, microbatch[-1], axis=0)
            return (x_SBTE, stages.constrain(left_MBTE, "microbatch")), seen | tap.seen

        start = (
            stages.zeros(inputs.batch, ("stage", plan.pipe)),
            stages.zeros(inputs.batch, ("microbatch", M)),
        )
        inner = probes_at(("embedding", *LAYER_POINTS), probes)
        ticks = jnp.arange(num_ticks(plan, M, backward=False))
        (_, left_MBTE), seen = lax.scan(tick, start, (ticks, inner))
        return left_MBTE, seen


class _Kept(NamedTuple):
    """What `1f1b` keeps from tick to tick: nothing in it has microbatches in front.

    `x` is what each stage hands on and `dx` what it hands back, `inputs` what it was given in the last D = 2 S - 1 ticks:
    so long the first stage waits until a microbatch comes back.
    """

    x_SBTE: Array
    dx_SBTE: Array
    inputs_DSBTE: Array
    loss_sum: Array
    tokens: Array
    sums: Arrays
    by_virtual: VirtualTokens


class Lockstep(Pipelined):
    """`1f1b` (PipeDream-Flush, arXiv 2006.09503) in lockstep: in a tick every stage makes the forward pass of one
    microbatch, and the backward pass of an earlier one, for which it makes the forward pass again.
    """

    def gradients(
        self, weights: Arrays, slots: Arrays, batch: Arrays, step: Array, *, listen: bool
    ) -> Passed:
        """Loss and gradients, and on request activations [rows, T, ...] (layers in front) with theirs."""
        stages, plan, M = self._stages, self._stages.plan, len(batch["rows"])
        inputs, probes = Inputs(weights, batch, step), stages.probes(batch) if listen else {}
        virtual, pull = jax.vjp(lambda slots: stages.encoded(slots, inputs).virtual, of_encoder(slots))
        inputs = inputs._replace(virtual=virtual)

        def tick(kept: _Kept, number: Array) -> tuple[_Kept, tuple[Arrays, Arrays]]:
            return self._pass_back(self._pass_on(kept, number, inputs), number, slots, probes, inputs)

        nothing = stages.zeros(batch, ("stage", plan.pipe))
        room = stages.zeros(batch, ("tick", 2 * plan.pipe - 1), ("stage", plan.pipe))
        loss_sum = jnp.zeros((), accumulation_dtype(stages.dtype))
        by_virtual = jax.tree.map(jnp.zeros_like, virtual)
        start = _Kept(nothing, nothing, room, loss_sum, jnp.zeros((), int), slots, by_virtual)
        kept, recorded = lax.scan(tick, start, jnp.arange(num_ticks(plan, M, backward=True)))
        microbatch = np.arange(M)
        at_head = backward_tick(plan, microbatch, plan.pipe - 1)
        seen, by_probe = (
            stages.in_order(
                {point: array[at_head] if point in HEAD_POINTS else array for point, array in found.items()},
                lambda stage, _: backward_tick(plan, microbatch, stage),
            )
            for found in recorded
        )
        (by_encoder,) = pull(kept.by_virtual)
        sums = kept.sums | {name: kept.sums[name] + gradient for name, gradient in by_encoder.items()}
        return Passed(kept.loss_sum, kept.tokens, sums, seen, by_probe)

    def _pass_on(self, kept: _Kept, number: Array, inputs: Inputs) -> _Kept:
        """The forward passes of a tick."""
        stages, plan, numbers = self._stages, self._stages.plan, jnp.arange(self._stages.plan.pipe)
        microbatch, _ = forward_work(plan, number, numbers)
        microbatch = jnp.clip(microbatch, 0, len(inputs.batch["rows"]) - 1)
        fresh_BTE = stages.enter({}, inputs, microbatch[0], Tap({}))
        x_SBTE = stages.handed_on(kept.x_SBTE, fresh_BTE, numbers == 0, by=1)
        slot = number % len(kept.inputs_DSBTE)
        inputs_DSBTE = lax.dynamic_update_index_in_dim(kept.inputs_DSBTE, x_SBTE, slot, axis=0)
        x_SBTE, _ = stages.run({}, x_SBTE, {}, inputs, microbatch)
        return kept._replace(x_SBTE=x_SBTE, inputs_DSBTE=stages.constrain(inputs_DSBTE, "tick", "stage"))

    def _pass_back(
        self, kept: _Kept, number: Array, slots: Arrays, probes: Probes, inputs: Inputs
    ) -> tuple[_Kept, tuple[Arrays, Arrays]]:
        """The backward passes of a tick; with what was seen on the way, and the gradients of the probes."""
        stages, plan, numbers = self._stages, self._stages.plan, jnp.arange(self._stages.plan.pipe)
        microbatch, M = backward_work(plan, number, numbers), len(inputs.batch["rows"])
        is_work = (microbatch[-1] >= 0) & (microbatch[-1] < M)
        microbatch = jnp.clip(microbatch, 0, M - 1)
        layer_slots, end_slots = layers_and_ends(slots)
        x_SBTE = self._given_before(kept.inputs_DSBTE, number)
        y_SBTE, pull, seen = jax.vjp(
            lambda slots, x, probes, virtual: stages.run(
                slots, x, probes, inputs._replace(virtual=virtual), microbatch
            ),
            layer_slots,
            x_SBTE,
            probes_at(LAYER_POINTS, probes),
            inputs.virtual,
            has_aux=True,
        )
        # No work has no targets: its gradient is zero, and so is all that follows from it, stage after stage.
        found = jax.value_and_grad(stages.leave, argnums=(0, 1, 2), has_aux=True)(
            end_slots, y_SBTE[-1], probes_at(HEAD_POINTS, probes), inputs, microbatch[-1], is_work
        )
        (loss_sum, (tokens, head_seen)), (by_head, dy_BTE, by_head_probe) = found
        dy_SBTE = stages.handed_on(kept.dx_SBTE, dy_BTE, numbers == plan.pipe - 1, by=-1)
        by_layers, dx_SBTE, by_probe, by_prefix = pull(dy_SBTE)
        dx_SBTE = stages.constrain(dx_SBTE, "stage")
        _, pull = jax.vjp(
            lambda slots, virtual: stages.enter(
                slots, inputs._replace(virtual=virtual), microbatch[0], Tap({})
            ),
            end_slots,
            inputs.virtual,
        )
        by_embedding, by_rows = pull(dx_SBTE[0])

        by_ends = jax.tree.map(jnp.add, by_head, by_embedding)
        sums = jax.tree.map(jnp.add, kept.sums, by_layers | by_ends)
        kept = kept._replace(
            dx_SBTE=dx_SBTE,
            loss_sum=kept.loss_sum + loss_sum,
            tokens=kept.tokens + tokens,
            sums=constrain_all(sums, stages.shardings.of["gradients"]),
            by_virtual=jax.tree.map(
                lambda *parts: sum(parts[1:], parts[0]), kept.by_virtual, by_prefix, by_rows
            ),
        )
        if probes:
            head_seen |= {"embedding": x_SBTE[0]}
            by_head_probe |= {"embedding": dx_SBTE[0]}
        return kept, (seen | head_seen, by_probe | by_head_probe)

    def _given_before(self, inputs_DSBTE: Array, number: Array) -> Array:
        """What each stage was given of the microbatch that comes back to it: the first stage waits longest."""
        S, D = self._stages.plan.pipe, len(inputs_DSBTE)
        at = (number - 2 * (S - 1 - jnp.arange(S))) % D
        return self._stages.constrain(jax.vmap(select_chunk, in_axes=(1, 0))(inputs_DSBTE, at), "stage")


def probes_at(points: Collection[str], probes: Probes) -> dict[str, Array]:
    """Those of `probes` that are at `points`."""
    return {point: probe for point, probe in probes.items() if point in points}


def passes_of(
    plan: Plan, spec: ModelSpec, shardings: Shardings, merge: Merge, dtype: DTypeLike
) -> Whole | Pipelined:
    """The passes that the plan asks for."""
    if plan.pipe == 1:
        return Whole(spec, merge, dtype)
    stages = Stages(plan, spec, shardings, merge, dtype)
    return Lockstep(stages) if plan.schedule == "1f1b" else Pipelined(stages)
