"""A pipeline: the model's own layers as the stages of DeepSpeed's, run in DeepSpeed's order, one batch at a time.

What is known of DeepSpeed's pipeline inside (0.19.8) stands in this file. Between stages only hidden states travel, and
their gradients: every process has the whole batch, so before each pass the engine is told which microbatch is in the
model. The update is not the schedule's: what the loop does between gradients and update comes first.
"""

# B examples, S sequence, T rows of a layer (`methods.virtual_tokens`), E embed, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.engine import Inputs, Microbatches, Store
from torchtrain.families import anatomy_of
from torchtrain.methods import layer_inputs
from torchtrain.tensor import Mesh, compute_device
from torchtrain.zero import FlatStore, import_deepspeed, initialize, quiet
from trainspec.methods import ENCODER
from trainspec.model import ModelSpec
from trainspec.plans.pipeline import Timeline, Work, layer_stages, partition_layers
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.trace import LAYER_POINTS, activation_points

# DeepSpeed's instructions of a stage, slot by slot.
_Schedule = Iterable[Sequence[Any]]


def timeline(plan: Plan, microbatches: int) -> Timeline:
    """What every stage does in each slot of a batch."""
    return tuple(tuple(_slots(_schedule(microbatches, plan.pipe, stage))) for stage in range(plan.pipe))


def _schedule(microbatches: int, stages: int, stage: int) -> _Schedule:
    """1F1B, with a place for the update after it."""
    schedule = import_deepspeed().runtime.pipe.schedule
    return schedule.TrainSchedule(micro_batches=microbatches, stages=stages, stage_id=stage)


def _slots(schedule: _Schedule) -> Iterator[Work | None]:
    forward = backward = 0
    for instructions in schedule:
        work = None
        for instruction in instructions:
            match instruction.name:
                case "ForwardPass":
                    work, forward = Work("forward", forward), forward + 1
                case "BackwardPass":
                    work, backward = Work("backward", backward), backward + 1
        yield work


def point_stages(plan: Plan, layers: int) -> dict[str, int]:
    """The stage of each of `trainspec.trace.activation_points`, in their order."""
    first, *inner, norm, logits = activation_points(layers)
    of_layers = np.repeat(layer_stages(plan, layers), len(LAYER_POINTS)).tolist()
    last = plan.pipe - 1
    return {first: 0, **dict(zip(inner, of_layers, strict=True)), norm: last, logits: last}


def placeholder() -> nn.Parameter:
    """What the optimizer of a stage updates, and stays 0, where the stage has no weight for one of its groups.

    DeepSpeed asks all stages for their part of the norm group by group, and takes no empty list.
    """
    return nn.Parameter(torch.zeros(1, device=compute_device()))


class PipelineEngine:
    """DeepSpeed's pipeline, kept from dividing by the number of microbatches and from updating by itself.

    `groups` are the process groups that it has made.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: ModelSpec,
        model: PreTrainedModel,
        optimizer: torch.optim.AdamW,
        *,
        mesh: Mesh,
    ) -> None:
        # DeepSpeed takes the mean over the replicas, of gradients that are shares of one batch.
        self.loss_scale = float(recipe.plan.replicas)
        anatomy = anatomy_of(model)
        self._rotary, self._norm = anatomy.rotary(model), anatomy.norm(model)
        self._at_hand: dict[str, Any] = {}
        with quiet():
            module = _stages(recipe.plan, model, self._at_hand, loss=lambda logits, _: self._at_end(logits))
        _add_trained(module, model, optimizer)
        self._stages = mesh.stages
        self._on_every_stage: list[nn.Parameter] = []
        made = layer_inputs(model, spec, recipe.method, tensor=mesh.tensor)
        self._layer_inputs = made or dict
        if made is not None:
            self._on_every_stage = [*model.get_submodule(ENCODER).parameters()]
            for parameter in self._on_every_stage:  # the norm counts those of the first stage
                parameter.ds_pipe_replicated = mesh.stages.index > 0  # pyright: ignore[reportAttributeAccessIssue]
        self._engine = initialize(recipe, spec, module, optimizer)
        self._engine._compute_loss = True
        self.store: Store = FlatStore(self._engine, optimizer)
        self.groups = _groups(self._engine)
        schedule = import_deepspeed().runtime.pipe.schedule
        self._engine._INSTRUCTION_MAP = self._engine._INSTRUCTION_MAP | {
            schedule.LoadMicroBatch: _nothing,  # the forward pass brings its own
            schedule.ForwardPass: self._forward_pass,
            schedule.BackwardPass: self._backward_pass,
            schedule.ReduceTiedGrads: self._reduce_shared,
            schedule.OptimizerStep: _nothing,  # comes with `step`
        }

    def accumulate(self, microbatches: Microbatches) -> None:
        """One run of the pipeline, with its reductions over tied stages and replicas."""

        def loss(logits_BTV: Tensor) -> Tensor:
            return microbatches.loss(self._forwards, logits_BTV) * self.loss_scale

        self._microbatches = microbatches
        schedule = _schedule(len(microbatches), self._engine.num_stages, self._engine.stage_id)
        self._run(schedule, microbatches.forward, loss)

    def infer(self, parts: Sequence[Inputs]) -> list[Tensor]:
        """Logits [B, T, V] of each part, on the last stage. The others are through before: a caller waits for all."""
        found: list[Tensor] = []

        def keep(logits_BTV: Tensor) -> Tensor:
            found.append(logits_BTV)
            return logits_BTV.new_zeros(())

        self._run(self._engine._inference_schedule(len(parts)), parts.__getitem__, keep)
        return found

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        self._engine._exec_optimizer_step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off."""
        self._engine.destroy()

    def _run(
        self, schedule: _Schedule, inputs: Callable[[int], Inputs], at_end: Callable[[Tensor], Tensor]
    ) -> None:
        """`inputs` of each microbatch go in at the first stage, `at_end` has the logits that come out at the last."""
        self._inputs, self._at_end = inputs, at_end
        self._forwards = self._backwards = 0
        self._engine.reset_activation_shape()  # it remembers that of the last run, which may have had more rows
        self._engine._exec_schedule(schedule)

    def _forward_pass(self, engine: Any, buffer_id: int) -> None:
        inputs = self._inputs(self._forwards)
        self._at_hand.update(
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            # Of the first argument only the type counts.
            position_embeddings=self._rotary(self._norm.weight, inputs["position_ids"]),
            **self._layer_inputs(),
        )
        if engine.is_first_stage():
            engine.pipe_buffers["inputs"][buffer_id] = inputs["input_ids"]
        type(engine)._exec_forward_pass(engine, buffer_id)
        self._forwards += 1

    def _backward_pass(self, engine: Any, buffer_id: int) -> None:
        self._microbatches.backward(self._backwards)
        if engine.is_last_stage():
            # The pipeline's own would divide by the number of microbatches.
            import_deepspeed().DeepSpeedEngine.backward(engine, engine.loss, scale_wrt_gas=False)
            engine.pipe_buffers["outputs"][buffer_id] = None  # the logits, which DeepSpeed would keep
        else:
            type(engine)._exec_backward_pass(engine, buffer_id)
        self._backwards += 1

    def _reduce_shared(self, engine: Any, **_: Any) -> None:
        """Every stage makes the prefix of all layers; the gradients of the others' layers are theirs."""
        type(engine)._exec_reduce_tied_grads(engine)
        for parameter in self._on_every_stage:
            # DeepSpeed's optimizer for bf16 that is summed in fp32 has the sum beside the parameter.
            gradient: Any = parameter.grad if not engine.using_bf16_optimizer else parameter._hp_grad  # pyright: ignore[reportAttributeAccessIssue]
            self._stages.sum_(gradient)


class _Block(nn.Module):
    """A decoder layer, which takes what is at hand of the microbatch beside the hidden states."""

    def __init__(self, layer: nn.Module, at_hand: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self._at_hand = at_hand

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        return self.layer(hidden_BTE, **self._at_hand)


class _Tied(nn.Module):
    """An embedding that is the head as well: DeepSpeed builds a module of its own for what stages share."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.embedding(ids_BS)


def _layers(model: PreTrainedModel, at_hand: dict[str, Any]) -> list[Any]:
    """The whole model in a row: the embedding, every layer, the final norm, the head."""
    anatomy = anatomy_of(model)
    embedding, head = anatomy.embedding(model), anatomy.head(model)
    middle = [*(_Block(layer, at_hand) for layer in anatomy.layers(model)), anatomy.norm(model)]
    # A frozen one stays as both stages have read it, without a gradient that they would have to sum.
    if not (model.config.tie_word_embeddings and embedding.weight.requires_grad):
        return [embedding, *middle, head]
    tied = import_deepspeed().pipe.TiedLayerSpec
    shared = {"tied_weight_attr": "embedding.weight"}
    return [
        tied("embedding", _Tied, embedding, **shared),
        *middle,
        tied("embedding", _Tied, embedding, forward_fn=lambda _, hidden_BTE: head(hidden_BTE), **shared),
    ]


@torch.no_grad()  # a tied weight is sent from one stage to the others, in place
def _stages(
    plan: Plan, model: PreTrainedModel, at_hand: dict[str, Any], loss: Callable[..., Tensor]
) -> nn.Module:
    """DeepSpeed's module of this process's stage."""
    deepspeed = import_deepspeed()

    class Stages(deepspeed.pipe.PipelineModule):
        """Cut where `trainspec.plans.pipeline` says; DeepSpeed's own ways count parameters."""

        def _partition_layers(self, method: str) -> None:
            inner = partition_layers(self._num_layers - 3, self.num_stages)
            # The embedding goes with the first layers, final norm and head with the last.
            self.parts = [0, *(1 + layers.start for layers in inner[1:]), self._num_layers]
            self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    # Axes in the order of the mesh, the last one fastest.
    topology = deepspeed.runtime.pipe.topology.PipeModelDataParallelTopology(
        num_pp=plan.pipe, num_mp=plan.tensor, num_dp=plan.replicas
    )
    return Stages(_layers(model, at_hand), topology=topology, loss_fn=loss)


def _add_trained(module: nn.Module, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> None:
    """Give DeepSpeed's module what this stage's optimizer updates beside its layers: an encoder, or placeholders."""
    for name, child in model.named_children():
        if name == ENCODER and not any(p.is_meta for p in child.parameters()):
            module.add_module(name, child)
    known = set(module.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in known:
                module.register_parameter(f"placeholder_{len(known)}", parameter)
                known.add(parameter)


def _groups(engine: Any) -> list[Any]:
    """The process groups that DeepSpeed has made for a pipeline."""
    grid = engine.grid
    tied = [shared["group"] for shared in engine.module.tied_comms.values()]
    whole = (grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group)
    return [engine.module.world_group, *whole, *tied]


def _nothing(engine: Any, **_: Any) -> None:
    """In the place of an instruction that is carried out elsewhere."""
