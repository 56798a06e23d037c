"""The functions of a backend: one update makes gradients of microbatches and a step of the engine."""

# B examples, S sequence, T positions of a layer (`methods.virtual_tokens`), V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.activations import Recording, by_point, point_stages, recorded
from torchtrain.attention.cache import Cache
from torchtrain.cluster import is_leader
from torchtrain.decoding import CachedRows
from torchtrain.dropout import DropoutPoint
from torchtrain.engines import make_engine
from torchtrain.engines.deepspeed import Partitioner
from torchtrain.engines.engine import Engine, Inputs, Saved, Stored, Stretch
from torchtrain.engines.pipeline import placeholder
from torchtrain.inputs import inputs_of, on_device
from torchtrain.loss import token_loss
from torchtrain.loss_chunks import HeadLoss
from torchtrain.mesh import Mesh, compute_device, make_mesh
from torchtrain.methods import all_labels, attach
from torchtrain.model import build_model
from torchtrain.optim import make_optimizer, set_learning_rate, set_steps
from torchtrain.precision import compute_dtype, to_numpy
from torchtrain.tensor_parallel import is_split
from torchtrain.weights import allocate, canonical_name, from_canonical, shards, to_canonical
from trainspec.causal import activation_points
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import ArrayKind, Shard
from trainspec.checkpoints.states import ArrayFormat
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.methods import leading_positions
from trainspec.params import Param
from trainspec.plans.pipeline import stages_of
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Arrays, Decoding, Metrics
from trainspec.trace import Keep
from trainspec.weight import WeightLike

# What a checkpoint calls each kind of tensor.
_SAVED: dict[Saved, ArrayKind] = {"weight": "weights", "moment1": "moment1", "moment2": "moment2"}


@dataclass(frozen=True)
class State:
    """A run after `step` updates. Module and optimizer are torch's: an update changes them in place."""

    step: int
    run: Run
    mesh: Mesh
    model: PreTrainedModel
    engine: Engine
    optimizer: torch.optim.AdamW
    point: DropoutPoint
    head: HeadLoss


def init_state(run: Run, *, like: State | None = None) -> State:
    """The run before its first update. `cluster.start` comes first.

    Differs from jaxtrain: nothing is compiled, so nothing of `like` is used again.
    """
    recipe, spec, weights = run.recipe, run.spec, list(starting_weights(run))
    policy, plan, mesh = recipe.precision.policy, recipe.plan, make_mesh(recipe.plan)
    model = build_model(spec, policy=policy, remat=plan.remat, attention=plan.attention, tensor=mesh.tensor)
    point = attach(model, spec, recipe.method, seed=recipe.run.seed, tensor=mesh.tensor)
    allocate(
        model,
        weights,
        dtype=compute_dtype(policy),
        tensor=mesh.tensor,
        is_mine=lambda p: mesh.stages.index in stages_of(p, plan, spec),
        shard=Partitioner(run, mesh),
    )
    optimizer = _optimizer(run, model)
    head = HeadLoss(model, point=point, tensor=mesh.tensor)
    engine = make_engine(run, model, optimizer, mesh=mesh)
    state = State(0, run, mesh, model, engine, optimizer, point, head)
    if policy == "bf16":
        # DeepSpeed has made its float32 masters from rounded weights; the other backend's are not rounded.
        names = {p.name for p in run.trained}
        trained = ((p, weight) for p, weight in weights if p.name in names)
        from_canonical(
            trained, _trainable(model), tensor=mesh.tensor, write=partial(engine.store.write, "weight")
        )
    return state


def _optimizer(run: Run, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW over the trained weights of this process's stage, in the same groups on every stage."""
    decays = {p.name: p.decay for p in run.trained}
    parameters = {name: p for name, p in _trainable(model).items() if not p.is_meta}
    decayed = {name for name in parameters if decays[canonical_name(name)]}
    for is_decayed in set(decays.values()) - {name in decayed for name in parameters}:
        name = f"placeholder.{is_decayed}"
        parameters[name] = placeholder()
        if is_decayed:
            decayed.add(name)
    return make_optimizer(run.recipe.optimizer, decayed, parameters=parameters)


def feed(state: State, batch: Batch) -> Batch:
    """The batch where a GPU can fetch it without the host; on a CPU itself.

    Differs from jaxtrain: the update itself asks for the copy, and does not wait for it.
    """
    if compute_device().type == "cpu":
        return batch
    return Batch(
        **{name: torch.from_numpy(array).pin_memory().numpy() for name, array in vars(batch).items()}
    )


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches and over processes. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    state.model.train()
    with nullcontext() if keep != "activations" else recorded(state.model) as recordings:
        microbatches = _Microbatches(state, batch, recordings)
        state.engine.accumulate(microbatches)
    loss_sum = state.mesh.total(microbatches.loss_sum).item()
    grad_norm = state.engine.store.norm()
    metrics = Metrics(loss_sum, batch.target_tokens, grad_norm)
    if keep != "nothing":
        metrics = replace(metrics, gradients=_arrays(state, "gradient", state.run.trained))
    if recordings is not None:
        metrics = _with_activations(metrics, state, recordings)
    if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
        state.model.zero_grad()
        line = f"step {state.step + 1}: loss sum {loss_sum}, gradient norm {grad_norm}"
        raise NonFiniteLossError(line, metrics)
    set_learning_rate(state.optimizer, lr)
    state.engine.step()
    return replace(state, step=state.step + 1), metrics


class _Microbatches:
    """What an engine asks of a batch: this process's examples of each microbatch, and the loss, summed over them.

    Each microbatch's forward pass appends to `recordings`, if there is such a list: then all logits are made at once.
    """

    def __init__(self, state: State, batch: Batch, recordings: list[Recording] | None) -> None:
        microbatches = batch.split(state.run.recipe.batch.accumulation * state.run.recipe.plan.microbatches)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=compute_device())
        self._state, self._batch, self._recordings = state, batch, recordings
        self._microbatches = [_own_examples(state, microbatch) for microbatch in microbatches]

    def __len__(self) -> int:
        return len(self._microbatches)

    def forward(self, index: int) -> Inputs:
        """What the next forward pass takes."""
        is_recorded = self._recordings is not None
        if self._recordings is None:
            _expect_loss(self._state, self._microbatches[index], divisor=self._batch.target_tokens)
        else:
            self._recordings.append(Recording())
        self._move_dropout(index)
        return inputs_of(self._microbatches[index], self._state.run, is_recorded=is_recorded)

    def loss(self, index: int, output: Tensor) -> Tensor:
        """The microbatch's share of the batch's loss."""
        microbatch, batch = self._microbatches[index], self._batch
        loss_sum = _loss_sum(self._state, microbatch, output)
        self.loss_sum += loss_sum.detach()
        return loss_sum / batch.target_tokens

    def backward(self, index: int) -> None:
        """A recomputed layer draws its dropout masks again, of this microbatch's examples."""
        self._move_dropout(index)

    def _move_dropout(self, index: int) -> None:
        point = self._state.point
        point.step, point.rows = self._state.step, on_device(self._microbatches[index].rows)


def _with_activations(metrics: Metrics, state: State, recordings: Sequence[Recording]) -> Metrics:
    recipe, spec = state.run.recipe, state.run.spec
    activations, gradients = by_point(
        recordings,
        point_stages(recipe.plan, spec.layers, activation_points(spec, recipe.method)),
        mesh=state.mesh,
        head_dim=spec.head_dim,
        scale=state.engine.loss_scale,
    )
    return replace(metrics, activations=activations, activation_gradients=gradients)


@torch.no_grad()
def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """(loss sum, target tokens) of a batch, without dropout."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=compute_device())
    expect = partial(_expect_loss, state, divisor=1)
    for microbatch, output in _inferred(state, batch, expect):
        loss_sum += _loss_sum(state, microbatch, output)
    return state.mesh.total(loss_sum).item(), batch.target_tokens


@torch.no_grad()
def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, V] at the tokens, without dropout."""
    logits_BTV = _whole_logits(state, (shard_BTV for _, shard_BTV in _inferred(state, batch)))
    return logits_BTV[:, leading_positions(state.run.recipe.method) :]


@torch.no_grad()
def next_logits(state: State, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
    """The logits [B, vocab] after position `last` [B] of each row, without dropout."""
    return _next_logits(state, batch, last)


def _next_logits(
    state: State, batch: Batch, last: NDArray[np.int32], cache: Cache | None = None
) -> NDArray[Any]:
    """The same; a `cache` keeps the keys and values of this replica's rows."""
    leading = leading_positions(state.run.recipe.method)

    def expect(microbatch: Batch) -> None:
        state.head.expect_logits(on_device(last[microbatch.rows] + leading))

    outputs = _inferred(state, batch, expect, cache)
    return _whole_logits(state, (logits_B1V for _, logits_B1V in outputs))[:, 0]


def _whole_logits(state: State, shards: Iterable[Tensor]) -> NDArray[Any]:
    """The head's output of all microbatches, on every process, from this process's shards of it."""
    mesh = state.mesh
    gathered = [mesh.replicas.gather(mesh.tensor.gather(shard_BTV, -1), 0) for shard_BTV in shards]
    return to_numpy(mesh.stages.share(torch.cat(gathered) if gathered else None, mesh.stages.size - 1))


def _inferred(
    state: State,
    batch: Batch,
    expect: Callable[[Batch], None] | None = None,
    cache: Cache | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """This replica's examples of each microbatch, with the head's output; none where the process has none.

    `expect` is called with the examples before each pass, and may have the head make something else than logits. A `cache`
    takes the keys and values of a batch that is one microbatch.
    """
    state.model.eval()
    count = state.run.recipe.plan.microbatches_of(len(batch.rows))
    microbatches = [_own_examples(state, microbatch) for microbatch in batch.split(count)]

    def inputs(index: int) -> Inputs:
        if expect is not None:
            expect(microbatches[index])
        made = inputs_of(microbatches[index], state.run)
        return made if cache is None else {**made, "cache": cache}

    return zip(microbatches, state.engine.infer(count, inputs), strict=False)


def decoding(state: State, *, length: int) -> Decoding | None:
    """A cache for rows of up to `length` tokens; None in a pipeline, whose stages would each have to be called for a token."""
    if state.mesh.stages.size > 1:
        return None
    # Weights that are gathered in inference mode could not be trained afterwards.
    without_gradients = torch.no_grad if state.run.recipe.plan.shards == "params" else torch.inference_mode

    @without_gradients()
    def begin(batch: Batch, last: NDArray[np.int32], cache: Cache) -> NDArray[Any]:
        return _next_logits(state, batch, last, cache)

    @without_gradients()
    def extend(inputs: Inputs) -> NDArray[Any]:
        return _whole_logits(state, state.engine.infer(1, lambda _: inputs))[:, 0]

    return CachedRows(state.run, state.mesh.replicas, length=length, begin=begin, extend=extend)


def weights_of(state: State, *, frozen: bool = False) -> Arrays:
    """Copies of the trained weights, and on request of the frozen ones, under their canonical names.

    Like all functions that give arrays by canonical name: whole for the leader, nothing for the others.
    """
    return _arrays(state, "weight", state.run.full_table if frozen else state.run.trained)


def moments_of(state: State) -> tuple[Arrays, Arrays]:
    """Copies of Adam's first and second moments under their weights' canonical names."""
    trained = state.run.trained
    return _arrays(state, "moment1", trained), _arrays(state, "moment2", trained)


def shards_of(state: State, copy: Copy = np.copy) -> Iterator[Shard]:
    """Copies of what this process saves of weights and moments. Nothing is gathered, and no process waits for another."""
    for kind, param, (first, elements) in _saved(state):
        host = to_numpy(elements)
        copied = copy(host) if elements.device.type == "cpu" else host
        yield from shards(kind, param, first, copied, tensor=state.mesh.tensor)


def copied_bytes(state: State) -> list[int]:
    """The size of each array that `shards_of` gives to `copy`; none on a GPU."""
    return [elements.nbytes for *_, (_, elements) in _saved(state) if elements.device.type == "cpu"]


def _saved(state: State) -> Iterator[tuple[ArrayKind, Param, Stretch]]:
    """What this process saves, where it is."""
    parameters = {canonical_name(name): p for name, p in _trainable(state.model).items()}
    mine = [param for param in state.run.trained if _saves(state, param)]
    for stored, kind in _SAVED.items():
        for param in mine:
            yield kind, param, state.engine.store.own(stored, parameters[param.name])


def _saves(state: State, param: Param) -> bool:
    """Whether this process's replicas save a weight: of several stages or tensor peers that have the same, the first ones do."""
    mesh, run = state.mesh, state.run
    is_first_stage = mesh.stages.index == stages_of(param, run.recipe.plan, run.spec)[0]
    return is_first_stage and (mesh.tensor.index == 0 or any(map(is_split, param.axes)))


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when `checkpoint` was saved; consumes `state`. Each process reads what it holds, a tensor at a time."""
    sources: tuple[tuple[Saved, Mapping[str, WeightLike]], ...] = (
        ("weight", checkpoint.weights),
        ("moment1", checkpoint.moment1),
        ("moment2", checkpoint.moment2),
    )
    for kind, arrays in sources:
        entries = ((p, arrays[p.name]) for p in state.run.trained)
        write = partial(state.engine.store.write, kind)
        from_canonical(entries, _trainable(state.model), tensor=state.mesh.tensor, write=write)
    set_steps(state.optimizer, checkpoint.step)
    return replace(state, step=checkpoint.step)


def native_format(run: Run, processes: Processes) -> ArrayFormat[State]:
    """There is none; a recipe that asks for it is refused by the backend's capabilities, and so is a checkpoint of another's."""
    raise AssertionError(f"{run.recipe.checkpoint.format} for {processes.count} process(es) was let through")


def _arrays(state: State, kind: Stored, table: Sequence[Param]) -> Arrays:
    """One kind of tensor of every entry of the table."""
    reduced = compute_dtype(state.run.recipe.precision.reduce)

    def read(parameter: nn.Parameter) -> Tensor:
        tensor = state.engine.store.read(kind, parameter)
        return tensor.to(reduced) if kind == "gradient" else tensor

    return to_canonical(
        dict(state.model.named_parameters()),
        table,
        mesh=state.mesh,
        stage=lambda p: stages_of(p, state.run.recipe.plan, state.run.spec)[0],
        read=read,
        keep=is_leader(),
    )


def _own_examples(state: State, batch: Batch) -> Batch:
    """This replica's."""
    replicas = state.mesh.replicas
    return batch.split(replicas.size)[replicas.index]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _expect_loss(state: State, batch: Batch, *, divisor: int) -> None:
    """Have the head make the loss of `batch` in the next forward pass, where the plan makes it in chunks."""
    run, (rows, tokens) = state.run, batch.labels.shape
    positions = leading_positions(run.recipe.method) + tokens
    chunk = run.recipe.plan.positions_at_once(rows, positions, run.spec.vocab)
    if chunk < positions:
        state.head.expect(_labels(state, batch), divisor=divisor, chunk=chunk)


def _loss_sum(state: State, batch: Batch, output: Tensor) -> Tensor:
    """The loss sum of `batch` from the head's output, which it is already where the head has made it."""
    if output.dim() == 0:
        return output
    return token_loss(output, _labels(state, batch), tensor=state.mesh.tensor)[0]


def _labels(state: State, batch: Batch) -> Tensor:
    return all_labels(on_device(batch.labels), state.run.recipe.method)
