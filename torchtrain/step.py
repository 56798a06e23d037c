"""One update: microbatches in, gradients summed, one step of the engine."""

# B examples, S sequence, T rows of a layer (`methods.virtual_tokens`), V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.activations import Recording, by_point, point_stages, recorded
from torchtrain.cluster import is_leader
from torchtrain.dropout import DropoutPoint
from torchtrain.engines import make_engine
from torchtrain.engines.deepspeed import Partitioner
from torchtrain.engines.engine import Engine, Inputs, Stored
from torchtrain.engines.pipeline import placeholder
from torchtrain.layers import attention_mask
from torchtrain.loss import token_loss
from torchtrain.mesh import Mesh, compute_device, make_mesh
from torchtrain.methods import all_labels, all_positions, all_visible, attach
from torchtrain.model import build_model
from torchtrain.optim import make_optimizer, set_learning_rate, set_steps
from torchtrain.precision import compute_dtype, to_numpy
from torchtrain.weights import allocate, canonical_name, from_canonical, to_canonical
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.methods import Method, leading_rows
from trainspec.params import Param
from trainspec.plans.pipeline import stages_of
from trainspec.runs.checkpoint import Checkpoint
from trainspec.runs.contract import Arrays, Metrics
from trainspec.runs.run import Run
from trainspec.trace import Keep
from trainspec.weight import WeightLike


@dataclass(frozen=True)
class State:
    """A run after `step` updates. The module and the optimizer are torch's: an update changes them in place."""

    step: int
    run: Run
    mesh: Mesh
    model: PreTrainedModel
    engine: Engine
    optimizer: torch.optim.AdamW
    point: DropoutPoint


def init_state(run: Run, *, like: State | None = None) -> State:
    """The run before its first update. `cluster.start` comes first.

    Differs from jaxtrain: of `like` nothing was compiled that could be used again.
    """
    recipe, spec, weights = run.recipe, run.spec, list(starting_weights(run))
    policy, mesh = recipe.precision.policy, make_mesh(recipe.plan)
    model = build_model(spec, policy=policy, remat=recipe.plan.remat, tensor=mesh.tensor)
    point = attach(model, spec, recipe.method, seed=recipe.run.seed, tensor=mesh.tensor)
    allocate(
        model,
        weights,
        dtype=compute_dtype(policy),
        tensor=mesh.tensor,
        is_mine=lambda p: mesh.stages.index in stages_of(p, recipe.plan, spec),
        settle=Partitioner(run, mesh),
    )
    optimizer = _optimizer(run, model)
    engine = make_engine(run, model, optimizer, mesh=mesh)
    state = State(0, run, mesh, model, engine, optimizer, point)
    if policy == "bf16":
        # DeepSpeed made its float32 masters from the rounded weights: they start where the other backend's do.
        names = {p.name for p in run.trained}
        trained = ((p, weight) for p, weight in weights if p.name in names)
        from_canonical(
            trained, _trainable(model), tensor=mesh.tensor, write=partial(engine.store.write, "weight")
        )
    return state


def _optimizer(run: Run, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW over the weights of this process's stage, in the same groups on every stage."""
    decays = {p.name: p.decay for p in run.trained}
    parameters = {name: p for name, p in _trainable(model).items() if not p.is_meta}
    decayed = {name for name in parameters if decays[canonical_name(name)]}
    for decays_too in set(decays.values()) - {name in decayed for name in parameters}:
        name = f"placeholder.{decays_too}"
        parameters[name] = placeholder()
        if decays_too:
            decayed.add(name)
    return make_optimizer(run.recipe.optimizer, decayed, parameters=parameters)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches and over processes. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    state.model.train()
    with nullcontext() if keep != "activations" else recorded(state.model) as recordings:
        rows = _Rows(state, batch, recordings)
        state.engine.accumulate(rows)
    loss_sum = state.mesh.total(rows.loss_sum).item()
    grad_norm = state.engine.store.norm()
    if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
        state.model.zero_grad()
        raise NonFiniteLossError(f"step {state.step + 1}: loss sum {loss_sum}, gradient norm {grad_norm}")
    metrics = Metrics(loss_sum, batch.target_tokens, grad_norm)
    if keep != "nothing":
        metrics = replace(metrics, gradients=_arrays(state, "gradient", state.run.trained))
    if recordings is not None:
        points = point_stages(state.run.recipe.plan, state.run.spec.layers)
        activations, activation_gradients = by_point(
            recordings, points, mesh=state.mesh, scale=state.engine.loss_scale
        )
        metrics = replace(metrics, activations=activations, activation_gradients=activation_gradients)
    set_learning_rate(state.optimizer, lr)
    state.engine.step()
    return replace(state, step=state.step + 1), metrics


class _Rows:
    """The microbatches of a batch, in this process's rows: what an engine asks of them, and the loss summed over them.

    Where there is a list of `recordings`, it gets one for every microbatch.
    """

    def __init__(self, state: State, batch: Batch, recordings: list[Recording] | None) -> None:
        parts = batch.split(state.run.recipe.batch.accumulation * state.run.recipe.plan.microbatches)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=compute_device())
        self._state, self._batch, self._recordings = state, batch, recordings
        self._parts = [_mine(state, part) for part in parts]

    def __len__(self) -> int:
        return len(self._parts)

    def forward(self, index: int) -> Inputs:
        """What the forward pass takes that comes next."""
        if self._recordings is not None:
            self._recordings.append(Recording())
        self._move_dropout(index)
        return _inputs(self._parts[index], self._state.run.recipe.method)

    def loss(self, index: int, logits: Tensor) -> Tensor:
        """The share of the batch's loss."""
        part, batch = self._parts[index], self._batch
        part_loss = _loss_sum(self._state, part, logits)
        self.loss_sum += part_loss.detach()
        return part_loss / batch.target_tokens

    def backward(self, index: int) -> None:
        """A layer that is computed again draws the masks of its own rows."""
        self._move_dropout(index)

    def _move_dropout(self, index: int) -> None:
        point = self._state.point
        point.step, point.rows = self._state.step, _tensor(self._parts[index].rows)


@torch.no_grad()
def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """(loss sum, target tokens) of a batch, without dropout."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=compute_device())
    for part, logits_BTV in _inferred(state, batch):
        loss_sum += _loss_sum(state, part, logits_BTV)
    return state.mesh.total(loss_sum).item(), batch.target_tokens


@torch.no_grad()
def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, V] at the tokens, without dropout."""
    mesh = state.mesh
    parts = [mesh.tensor.gather(part_BTV, -1) for _, part_BTV in _inferred(state, batch)]
    whole = torch.cat([mesh.replicas.gather(part_BTV, 0) for part_BTV in parts]) if parts else None
    return to_numpy(mesh.stages.share(whole, mesh.stages.size - 1))[
        :, leading_rows(state.run.recipe.method) :
    ]


def _inferred(state: State, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
    """This replica's rows of a batch with their logits, in parts, where the process has logits.

    A pipeline takes them as microbatches.
    """
    state.model.eval()
    microbatches = state.run.recipe.plan.microbatches_of(len(batch.rows))
    parts = [_mine(state, part) for part in batch.split(microbatches)]
    inputs = [_inputs(part, state.run.recipe.method) for part in parts]
    return zip(parts, state.engine.infer(inputs), strict=False)


def weights_of(state: State, *, frozen: bool = False) -> Arrays:
    """Copies of the trained weights, and on request of the frozen ones, under their canonical names.

    As all functions that give arrays by canonical name: whole for the leader, and nothing for the others.
    """
    return _arrays(state, "weight", state.run.full_table if frozen else state.run.trained)


def moments_of(state: State) -> tuple[Arrays, Arrays]:
    """Copies of Adam's first and second moments under their weights' canonical names."""
    trained = state.run.trained
    return _arrays(state, "moment1", trained), _arrays(state, "moment2", trained)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` moved to where `checkpoint` was saved; consumes `state`."""
    sources: tuple[tuple[Stored, Mapping[str, WeightLike]], ...] = (
        ("weight", checkpoint.weights),
        ("moment1", checkpoint.moment1),
        ("moment2", checkpoint.moment2),
    )
    for what, arrays in sources:
        rows = ((p, arrays[p.name]) for p in state.run.trained)
        write = partial(state.engine.store.write, what)
        from_canonical(rows, _trainable(state.model), tensor=state.mesh.tensor, write=write)
    set_steps(state.optimizer, checkpoint.step)
    return replace(state, step=checkpoint.step)


def _arrays(state: State, what: Stored, table: Sequence[Param]) -> Arrays:
    """One kind of tensor of every row of the table."""
    reduced = compute_dtype(state.run.recipe.precision.reduce)

    def read(parameter: nn.Parameter) -> Tensor:
        found = state.engine.store.read(what, parameter)
        return found.to(reduced) if what == "gradient" else found

    return to_canonical(
        dict(state.model.named_parameters()),
        table,
        mesh=state.mesh,
        stage=lambda p: stages_of(p, state.run.recipe.plan, state.run.spec)[0],
        read=read,
        keep=is_leader(),
    )


def _mine(state: State, batch: Batch) -> Batch:
    """This replica's rows."""
    replicas = state.mesh.replicas
    return batch.split(replicas.size)[replicas.index]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _inputs(batch: Batch, method: Method) -> Inputs:
    return {
        "input_ids": _tensor(batch.input_ids),
        "position_ids": all_positions(_tensor(batch.positions), method),
        "attention_mask": all_visible(attention_mask(_tensor(batch.segments)), method),
    }


def _loss_sum(state: State, batch: Batch, logits_BTV: Tensor) -> Tensor:
    labels_BT = all_labels(_tensor(batch.labels), state.run.recipe.method)
    return token_loss(logits_BTV, labels_BT, tensor=state.mesh.tensor)[0]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(compute_device(), torch.int64)
