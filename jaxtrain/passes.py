"""The forward and backward pass over an accumulation slice: on a single stage, or through the stages of a pipeline.

All three ways give the same numbers. `AutodiffPipeline` differentiates a loop of forward passes; `OneFOneB` computes its
gradients in the loop, so that what it keeps depends on the number of stages alone. Dimensions are named in `pipeline.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.activations import NO_PROBES, Probes, zero_probes
from jaxtrain.dropout import DropoutPoint
from jaxtrain.layers import VirtualTokens, at_position
from jaxtrain.loss_chunks import head_loss
from jaxtrain.pipeline import (
    Inputs,
    ModelFactory,
    Recorded,
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


class PassOutput(NamedTuple):
    """What the passes over an accumulation slice give. Gradients are those of the summed loss.

    Activations and their gradients are [examples, ...] by point, with layers in front; empty if they were not asked for.
    """

    loss_sum: Array
    tokens: Array
    gradients: Arrays
    activations: Arrays
    activation_gradients: Arrays


class SingleStage:
    """The whole model on every device, all examples at a time: batches are [B, T], input ids [B, S] (`methods.virtual_tokens`)."""

    def __init__(self, plan: Plan, bind_weights: ModelFactory) -> None:
        self._plan, self._bind_weights = plan, bind_weights

    def logits(self, weights: Arrays, batch: Arrays) -> Array:
        """The model's output [examples, T, vocab], without dropout."""
        model, inputs = self._bind_weights(weights, {}), _model_inputs(batch)
        return model(**inputs)[0]

    def next_logits(self, weights: Arrays, batch: Arrays, last_B: Array) -> Array:
        """The model's output [examples, vocab] at one position of each row, without dropout."""
        model = self._bind_weights(weights, {})

        def end(x_BTE: Array) -> Array:
            return model.head(at_position(x_BTE, last_B), None)

        return model(**_model_inputs(batch), end=end)[0][:, 0]

    def evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        """Loss sum and target tokens, without dropout."""
        return self._forward(weights, {}, batch, None, NO_PROBES)[0]

    def gradients(
        self,
        weights: Arrays,
        grad_placeholders: Arrays,
        batch: Arrays,
        step: Array,
        *,
        record_activations: bool,
    ) -> PassOutput:
        """Loss and gradients; on request activations and theirs."""
        point, probes = DropoutPoint(step, batch["rows"]), NO_PROBES
        if record_activations:
            probes = zero_probes(lambda: self._forward(weights, {}, batch, point, None)[1])

        def loss(grad_placeholders: Arrays, probes: Probes) -> tuple[Array, tuple[Array, Arrays]]:
            (loss_sum, tokens), activations = self._forward(weights, grad_placeholders, batch, point, probes)
            return loss_sum, (tokens, activations)

        loss_and_gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (loss_sum, (tokens, activations)), gradients = loss_and_gradients(grad_placeholders, probes)
        return PassOutput(loss_sum, tokens, gradients[0], activations, gradients[1])

    def _forward(
        self,
        weights: Arrays,
        grad_placeholders: Arrays,
        batch: Arrays,
        point: DropoutPoint | None,
        probes: Probes,
    ) -> tuple[tuple[Array, Array], Arrays]:
        """Loss sum and target tokens, and recorded activations."""
        model = self._bind_weights(weights, grad_placeholders)

        def end(x_BTE: Array) -> tuple[Array, Array]:
            return head_loss(model, x_BTE, batch["labels"], point, self._plan)

        return model(**_model_inputs(batch), point=point, probes=probes, end=end)


class AutodiffPipeline:
    """`gpipe` (arXiv 1811.06965) and `interleaved` (arXiv 2104.04473): autodiff of a loop of forward passes.

    Batches have the microbatches in front: [M, B, T].
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def logits(self, weights: Arrays, batch: Arrays) -> Array:
        """The model's output [examples, T, vocab], without dropout."""
        inputs = self._stages.encode({}, Inputs(weights, batch, None))
        x_MBTE, _ = self._forward({}, Recorded(), inputs)
        logits = lax.map(lambda x_BTE: self._stages.logits({}, x_BTE, inputs, None), x_MBTE)
        return logits.reshape(-1, *logits.shape[2:])

    def next_logits(self, weights: Arrays, batch: Arrays, last_B: Array) -> Array:
        """The model's output [examples, vocab] at one position of each row, without dropout."""
        inputs = self._stages.encode({}, Inputs(weights, batch, None))
        x_MBTE, _ = self._forward({}, Recorded(), inputs)
        last_MB = last_B.reshape(len(x_MBTE), -1)
        logits = lax.map(
            lambda xs: self._stages.logits({}, at_position(*xs), inputs, None)[:, 0], (x_MBTE, last_MB)
        )
        return logits.reshape(-1, logits.shape[-1])

    def evaluate(self, weights: Arrays, batch: Arrays) -> tuple[Array, Array]:
        """Loss sum and target tokens, without dropout."""
        loss_sum, (tokens, _) = self._loss({}, Recorded(), Inputs(weights, batch, None))
        return loss_sum, tokens

    def gradients(
        self,
        weights: Arrays,
        grad_placeholders: Arrays,
        batch: Arrays,
        step: Array,
        *,
        record_activations: bool,
    ) -> PassOutput:
        """Loss and gradients; on request activations and theirs."""
        stages, plan, M = self._stages, self._stages.plan, len(batch["rows"])
        ticks, microbatch = num_ticks(plan, M, backward=False), np.arange(M)
        inputs, probes = Inputs(weights, batch, step), Recorded()
        if record_activations:
            tick = stages.probes(stages.encode({}, inputs))
            probes = Recorded(_times(ticks, tick.embedding), _times(ticks, tick.layers), _times(M, tick.head))
        loss_and_gradients = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)
        (loss_sum, (tokens, activations)), (gradients, activation_gradients) = loss_and_gradients(
            grad_placeholders, probes, inputs
        )
        activations, activation_gradients = (
            stages.in_order(
                recorded,
                layer_ticks_LM=forward_tick(
                    plan, microbatch, stages.chunk_of[:, None], stages.stage_of[:, None]
                ),
                embedding_ticks_M=forward_tick(plan, microbatch, 0, 0),
            )
            for recorded in (activations, activation_gradients)
        )
        return PassOutput(loss_sum, tokens, gradients, activations, activation_gradients)

    def _loss(
        self, grad_placeholders: Arrays, probes: Recorded, inputs: Inputs
    ) -> tuple[Array, tuple[Array, Recorded]]:
        """Loss sum, target tokens and recorded activations; logits exist for one microbatch at a time, or a chunk of it."""
        inputs = self._stages.encode(grad_placeholders, inputs)
        x_MBTE, recorded = self._forward(grad_placeholders, probes, inputs)

        def add(
            sums: tuple[Array, Array], xs: tuple[Array, Probes, Array]
        ) -> tuple[tuple[Array, Array], Arrays]:
            x_BTE, probes, microbatch = xs
            loss_sum, (tokens, recorded) = self._stages.loss(
                grad_placeholders, x_BTE, probes, inputs, microbatch
            )
            return (sums[0] + loss_sum, sums[1] + tokens), recorded

        start = (jnp.zeros((), accumulation_dtype(x_MBTE.dtype)), jnp.zeros((), int))
        microbatches = (x_MBTE, probes.head, jnp.arange(len(x_MBTE)))
        (loss_sum, tokens), head = lax.scan(jax.checkpoint(add, prevent_cse=False), start, microbatches)
        return loss_sum, (tokens, recorded._replace(head=head))

    def _forward(self, grad_placeholders: Arrays, probes: Recorded, inputs: Inputs) -> tuple[Array, Recorded]:
        """The last layer's output [M, B, T, E], and the activations recorded in every tick up to there."""
        stages, plan, M = self._stages, self._stages.plan, len(inputs.batch["rows"])
        stage = jnp.arange(plan.pipe)

        def run_tick(
            carry: tuple[Array, Array], xs: tuple[Array, Probes, Probes]
        ) -> tuple[tuple[Array, Array], Recorded]:
            (x_SBTE, last_MBTE), (tick, of_embedding, of_layers) = carry, xs
            microbatch, chunk = forward_work(plan, tick, stage)
            microbatch = jnp.clip(microbatch, 0, M - 1)
            embedded_BTE, embedding = stages.embed(grad_placeholders, of_embedding, inputs, microbatch[0])
            x_SBTE = stages.hand_on(x_SBTE, embedded_BTE, (stage == 0) & (chunk == 0), by=1)
            x_SBTE, layers = stages.run(grad_placeholders, x_SBTE, of_layers, inputs, microbatch, chunk)
            # A microbatch's later chunk overwrites its earlier one, and work overwrites what an idle stage computed.
            last_BTE = stages.constrain(x_SBTE[-1])
            # Not `.at[].set`: that is a scatter, in the backward pass a gather, for which the compiler gathers all examples.
            last_MBTE = lax.dynamic_update_index_in_dim(last_MBTE, last_BTE, microbatch[-1], axis=0)
            return (x_SBTE, stages.constrain(last_MBTE, "microbatch")), Recorded(embedding, layers)

        start = (
            stages.zeros(inputs.batch, ("stage", plan.pipe)),
            stages.zeros(inputs.batch, ("microbatch", M)),
        )
        ticks = jnp.arange(num_ticks(plan, M, backward=False))
        (_, last_MBTE), recorded = lax.scan(run_tick, start, (ticks, probes.embedding, probes.layers))
        return last_MBTE, recorded


class PipelineCarry(NamedTuple):
    """What `1f1b` carries from tick to tick: nothing in it grows with the number of microbatches.

    `x` is each stage's output and `dx` the gradient of its input; `inputs` are the stages' inputs of the last D = 2S - 1
    ticks, the longest time between a microbatch's forward and backward pass (stage 0).
    """

    x_SBTE: Array
    dx_SBTE: Array
    inputs_DSBTE: Array
    loss_sum: Array
    tokens: Array
    gradients: Arrays
    virtual_gradients: VirtualTokens


class OneFOneB(AutodiffPipeline):
    """`1f1b` (PipeDream-Flush, arXiv 2006.09503) in lockstep: in a tick every stage makes the forward pass of one microbatch
    and the backward pass of an earlier one, for which it repeats the forward pass.
    """

    def gradients(
        self,
        weights: Arrays,
        grad_placeholders: Arrays,
        batch: Arrays,
        step: Array,
        *,
        record_activations: bool,
    ) -> PassOutput:
        """Loss and gradients; on request activations and theirs."""
        stages, plan, M = self._stages, self._stages.plan, len(batch["rows"])
        inputs = Inputs(weights, batch, step)

        def encode(grad_placeholders: Arrays) -> VirtualTokens:
            return stages.encode(grad_placeholders, inputs).virtual

        virtual, encode_vjp = jax.vjp(encode, of_encoder(grad_placeholders))
        encoded = inputs._replace(virtual=virtual)
        probes = stages.probes(encoded) if record_activations else Recorded()

        def run_tick(carry: PipelineCarry, tick: Array) -> tuple[PipelineCarry, tuple[Recorded, Recorded]]:
            carry = self._pass_forward(carry, tick, encoded)
            return self._pass_backward(carry, tick, grad_placeholders, probes, encoded)

        no_x_SBTE = stages.zeros(batch, ("stage", plan.pipe))
        start = PipelineCarry(
            x_SBTE=no_x_SBTE,
            dx_SBTE=no_x_SBTE,
            inputs_DSBTE=stages.zeros(batch, ("tick", 2 * plan.pipe - 1), ("stage", plan.pipe)),
            loss_sum=jnp.zeros((), accumulation_dtype(stages.dtype)),
            tokens=jnp.zeros((), int),
            gradients=grad_placeholders,  # zeros
            virtual_gradients=jax.tree.map(jnp.zeros_like, virtual),
        )
        end, recorded = lax.scan(run_tick, start, jnp.arange(num_ticks(plan, M, backward=True)))
        activations, activation_gradients = (self._in_order(by_tick, M) for by_tick in recorded)
        (encoder_gradients,) = encode_vjp(end.virtual_gradients)
        gradients = end.gradients | {
            name: end.gradients[name] + gradient for name, gradient in encoder_gradients.items()
        }
        return PassOutput(end.loss_sum, end.tokens, gradients, activations, activation_gradients)

    def _pass_forward(self, carry: PipelineCarry, tick: Array, inputs: Inputs) -> PipelineCarry:
        """The forward passes of a tick."""
        stages, plan, stage = self._stages, self._stages.plan, jnp.arange(self._stages.plan.pipe)
        microbatch, _ = forward_work(plan, tick, stage)
        microbatch = jnp.clip(microbatch, 0, len(inputs.batch["rows"]) - 1)
        embedded_BTE, _ = stages.embed({}, NO_PROBES, inputs, microbatch[0])
        x_SBTE = stages.hand_on(carry.x_SBTE, embedded_BTE, stage == 0, by=1)
        inputs_DSBTE = lax.dynamic_update_index_in_dim(
            carry.inputs_DSBTE, x_SBTE, tick % len(carry.inputs_DSBTE), axis=0
        )
        x_SBTE, _ = stages.run({}, x_SBTE, NO_PROBES, inputs, microbatch)
        return carry._replace(x_SBTE=x_SBTE, inputs_DSBTE=stages.constrain(inputs_DSBTE, "tick", "stage"))

    def _pass_backward(
        self, carry: PipelineCarry, tick: Array, grad_placeholders: Arrays, probes: Recorded, inputs: Inputs
    ) -> tuple[PipelineCarry, tuple[Recorded, Recorded]]:
        """The backward passes of a tick, and what is recorded in it: activations, and the gradients of their probes."""
        stages, plan, stage = self._stages, self._stages.plan, jnp.arange(self._stages.plan.pipe)
        microbatch, M = backward_work(plan, tick, stage), len(inputs.batch["rows"])
        is_work = (microbatch[-1] >= 0) & (microbatch[-1] < M)
        microbatch = jnp.clip(microbatch, 0, M - 1)
        layer_placeholders, end_placeholders = layers_and_ends(grad_placeholders)

        def run_layers(
            placeholders: Arrays, x_SBTE: Array, probes: Probes, virtual: VirtualTokens
        ) -> tuple[Array, Arrays]:
            return stages.run(placeholders, x_SBTE, probes, inputs._replace(virtual=virtual), microbatch)

        def embed(placeholders: Arrays, virtual: VirtualTokens, probes: Probes) -> tuple[Array, Arrays]:
            return stages.embed(placeholders, probes, inputs._replace(virtual=virtual), microbatch[0])

        # The forward passes once more.
        x_SBTE = self._earlier_inputs(carry.inputs_DSBTE, tick)
        y_SBTE, layers_vjp, layers = jax.vjp(
            run_layers, layer_placeholders, x_SBTE, probes.layers, inputs.virtual, has_aux=True
        )
        # An idle last stage has no targets: its gradient is zero, and so are those of the stages before it in later ticks.
        loss_and_gradients = jax.value_and_grad(stages.loss, argnums=(0, 1, 2), has_aux=True)
        (loss_sum, (tokens, head)), (head_gradients, dy_BTE, d_head) = loss_and_gradients(
            end_placeholders, y_SBTE[-1], probes.head, inputs, microbatch[-1], is_work
        )
        dy_SBTE = stages.hand_on(carry.dx_SBTE, dy_BTE, stage == plan.pipe - 1, by=-1)
        layer_gradients, dx_SBTE, d_layers, prefix_gradients = layers_vjp(dy_SBTE)
        dx_SBTE = stages.constrain(dx_SBTE, "stage")
        _, embed_vjp, embedding = jax.vjp(
            embed, end_placeholders, inputs.virtual, probes.embedding, has_aux=True
        )
        embedding_gradients, prompt_gradients, d_embedding = embed_vjp(dx_SBTE[0])
        end_gradients = jax.tree.map(jnp.add, head_gradients, embedding_gradients)

        gradients = jax.tree.map(jnp.add, carry.gradients, layer_gradients | end_gradients)
        virtual_gradients = jax.tree.map(
            lambda *terms: sum(terms[1:], terms[0]),
            carry.virtual_gradients,
            prefix_gradients,
            prompt_gradients,
        )
        carry = carry._replace(
            dx_SBTE=dx_SBTE,
            loss_sum=carry.loss_sum + loss_sum,
            tokens=carry.tokens + tokens,
            gradients=constrain_all(gradients, stages.shardings.of["gradients"]),
            virtual_gradients=virtual_gradients,
        )
        if embedding:  # what the layers took, from the forward pass
            embedding |= {"embedding": x_SBTE[0]}
        return carry, (Recorded(embedding, layers, head), Recorded(d_embedding, d_layers, d_head))

    def _earlier_inputs(self, inputs_DSBTE: Array, tick: Array) -> Array:
        """Each stage's input of the microbatch whose backward pass is due: the first stage's is the oldest."""
        S, D = self._stages.plan.pipe, len(inputs_DSBTE)
        slot_S = (tick - 2 * (S - 1 - jnp.arange(S))) % D
        return self._stages.constrain(jax.vmap(select_chunk, in_axes=(1, 0))(inputs_DSBTE, slot_S), "stage")

    def _in_order(self, by_tick: Recorded, microbatches: int) -> Arrays:
        """What was recorded in every tick, in the order of examples: a microbatch's is that of its backward pass."""
        stages, plan, microbatch = self._stages, self._stages.plan, np.arange(microbatches)
        head_ticks_M = backward_tick(plan, microbatch, plan.pipe - 1)
        return stages.in_order(
            by_tick._replace(head=jax.tree.map(lambda array: array[head_ticks_M], by_tick.head)),
            layer_ticks_LM=backward_tick(plan, microbatch, stages.stage_of[:, None]),
            embedding_ticks_M=backward_tick(plan, microbatch, 0),
        )


def _model_inputs(batch: Arrays) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "positions", "segments")}


def _times(count: int, probes: Probes) -> Probes:
    """Probes [count, ...], all zero."""
    return jax.tree.map(lambda probe: jnp.zeros((count, *probe.shape), probe.dtype), probes)


def passes_of(
    plan: Plan, spec: ModelSpec, shardings: Shardings, bind_weights: ModelFactory, dtype: DTypeLike
) -> SingleStage | AutodiffPipeline:
    """The passes that the plan asks for."""
    if plan.pipe == 1:
        return SingleStage(plan, bind_weights)
    stages = Stages(plan, spec, shardings, bind_weights, dtype)
    return OneFOneB(stages) if plan.schedule == "1f1b" else AutodiffPipeline(stages)
