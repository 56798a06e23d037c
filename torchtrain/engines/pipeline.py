"""A pipeline: the model's own layers as the stages of DeepSpeed's, run in DeepSpeed's order, one batch at a time.

Only hidden states and their gradients travel between stages: every process has the whole batch, and is told before each
pass which microbatch is in the model. The update is not the schedule's: it comes with `step`, as for every engine.
"""

# B examples, S sequence, T positions of a layer (`methods.virtual_tokens`), E embed, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain._deepspeed import (
    Pipeline,
    Schedule,
    import_deepspeed,
    mark_pipe_replicated,
    pipeline_module,
    release,
    training_schedule,
)
from torchtrain.cluster import SESSION
from torchtrain.engines.deepspeed import FlatStore, initialize
from torchtrain.engines.engine import Inputs, Microbatches, Store
from torchtrain.families import anatomy_of
from torchtrain.mesh import Mesh, compute_device
from torchtrain.methods import layer_inputs
from trainspec.methods import ENCODER
from trainspec.plans.pipeline import Timeline, Work, partition_layers
from trainspec.plans.plan import Plan
from trainspec.runs.run import Run


def timeline(plan: Plan, microbatches: int) -> Timeline:
    """What every stage does in each slot of a batch."""
    return tuple(
        tuple(_slots(training_schedule(microbatches, plan.pipe, stage))) for stage in range(plan.pipe)
    )


def _slots(schedule: Schedule) -> Iterator[Work | None]:
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


def placeholder() -> nn.Parameter:
    """What the optimizer of a stage updates, and stays 0, where the stage has no weight for one of its groups.

    DeepSpeed asks all stages for their share of the norm group by group, and takes no empty list.
    """
    return nn.Parameter(torch.zeros(1, device=compute_device()))


class PipelineEngine:
    """DeepSpeed's pipeline, kept from dividing by the number of microbatches and from updating by itself."""

    def __init__(self, run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, *, mesh: Mesh) -> None:
        plan = run.recipe.plan
        # DeepSpeed takes the mean over the replicas, of gradients that are shares of one batch.
        self.loss_scale = float(plan.replicas)
        anatomy = anatomy_of(model)
        self._rotary, self._norm = anatomy.rotary(model), anatomy.norm(model)
        self._layer_arguments: dict[str, Any] = {}
        layers = _layers(model, self._layer_arguments)
        module = pipeline_module(
            layers, plan=plan, bounds=_bounds(len(layers), plan), loss=lambda output, _: self._at_end(output)
        )
        _add_trained(module, model, optimizer)
        self._stages = mesh.stages
        self._on_every_stage: list[nn.Parameter] = []
        make_inputs = layer_inputs(model, run.spec, run.recipe.method, tensor=mesh.tensor)
        self._layer_inputs = make_inputs or dict
        if make_inputs is not None:
            self._on_every_stage = [*model.get_submodule(ENCODER).parameters()]
            for parameter in self._on_every_stage:  # the norm counts those of the first stage
                mark_pipe_replicated(parameter, mesh.stages.index > 0)
        self._engine = initialize(run, module, optimizer)
        self._pipeline = Pipeline(
            self._engine,
            forward=self._forward_pass,
            backward=self._backward_pass,
            reduce_shared=self._reduce_shared,
        )
        self.store: Store = FlatStore(self._engine, optimizer)
        SESSION.groups.extend(self._pipeline.groups)

    def accumulate(self, microbatches: Microbatches) -> None:
        """One run of the pipeline, with its reductions over tied stages and replicas."""

        def loss(output: Tensor) -> Tensor:
            return microbatches.loss(self._forwards, output) * self.loss_scale

        self._microbatches = microbatches
        self._begin(microbatches.forward, loss)
        self._pipeline.train(len(microbatches))

    def infer(self, count: int, inputs: Callable[[int], Inputs]) -> list[Tensor]:
        """The head's output of each microbatch, on the last stage. The others end before it: a caller waits for all."""
        outputs: list[Tensor] = []

        def collect(output: Tensor) -> Tensor:
            outputs.append(output)
            return output.new_zeros(())

        self._begin(inputs, collect)
        self._pipeline.infer(count)
        return outputs

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        self._pipeline.update()

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        release(self._engine)

    def _begin(self, inputs: Callable[[int], Inputs], at_end: Callable[[Tensor], Tensor]) -> None:
        """`inputs` of each microbatch go in at the first stage; `at_end` is called with the head's output at the last."""
        self._inputs, self._at_end = inputs, at_end
        self._forwards = self._backwards = 0

    def _forward_pass(self, buffer: int) -> None:
        inputs = self._inputs(self._forwards)
        self._layer_arguments.update(
            visible=inputs["visible"],
            position_ids=inputs["position_ids"],
            # Of the first argument only the type counts.
            position_embeddings=self._rotary(self._norm.weight, inputs["position_ids"]),
            **self._layer_inputs(),
        )
        if self._pipeline.is_first_stage:
            self._pipeline.set_input(buffer, inputs["input_ids"])
        self._pipeline.forward_pass(buffer)
        self._forwards += 1

    def _backward_pass(self, buffer: int) -> None:
        self._microbatches.backward(self._backwards)
        self._pipeline.backward_pass(buffer)
        self._backwards += 1

    def _reduce_shared(self) -> None:
        """Every stage makes the prefix of all layers: the gradients of the others' layers are theirs."""
        self._pipeline.reduce_tied()
        for parameter in self._on_every_stage:
            self._stages.sum_(self._pipeline.gradient(parameter))


class _Block(nn.Module):
    """A decoder layer, called with the microbatch's `arguments` besides the hidden states."""

    def __init__(self, layer: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self._arguments = arguments

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        return self.layer(hidden_BTE, **self._arguments)


class _Tied(nn.Module):
    """An embedding that is the head as well: DeepSpeed builds a module of its own for what stages share."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.embedding(ids_BS)


def _layers(model: PreTrainedModel, arguments: dict[str, Any]) -> list[Any]:
    """The whole model as a list: the embedding, every layer, the final norm, the head."""
    anatomy = anatomy_of(model)
    embedding, head = anatomy.embedding(model), anatomy.head(model)
    middle = [*(_Block(layer, arguments) for layer in anatomy.layers(model)), anatomy.norm(model)]
    # A frozen one stays as both stages have read it, without a gradient to be summed.
    if not (model.config.tie_word_embeddings and embedding.weight.requires_grad):
        return [embedding, *middle, head]
    tied = import_deepspeed().pipe.TiedLayerSpec
    shared = {"tied_weight_attr": "embedding.weight"}
    return [
        tied("embedding", _Tied, embedding, **shared),
        *middle,
        tied("embedding", _Tied, embedding, forward_fn=lambda _, hidden_BTE: head(hidden_BTE), **shared),
    ]


def _bounds(count: int, plan: Plan) -> list[int]:
    """Where each stage begins in the list of all `count` layers, and its end; as `trainspec.plans.pipeline` cuts."""
    decoder = partition_layers(count - 3, plan.pipe)
    # The embedding goes with the first layers, final norm and head with the last.
    return [0, *(1 + layers.start for layers in decoder[1:]), count]


def _add_trained(module: nn.Module, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> None:
    """Give DeepSpeed's module what this stage's optimizer updates besides its layers: an encoder, or placeholders."""
    for name, child in model.named_children():
        if name == ENCODER and not any(p.is_meta for p in child.parameters()):
            module.add_module(name, child)
    known = set(module.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in known:
                module.register_parameter(f"placeholder_{len(known)}", parameter)
                known.add(parameter)
