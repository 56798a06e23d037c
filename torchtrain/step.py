"""One update: microbatches in, gradients summed, one step of the engine."""

# B examples, S sequence, V vocabulary

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from torchtrain.activations import Recording, by_point, recorded
from torchtrain.dropout import DropoutPoint
from torchtrain.loss import token_loss
from torchtrain.methods import attach
from torchtrain.model import attention_mask, build_model
from torchtrain.optim import global_norm, make_optimizer, moments, set_learning_rate, set_steps
from torchtrain.parallel import Engine, make_engine
from torchtrain.weights import canonical_name, from_canonical, to_canonical
from trainspec.checkpoint import Checkpoint
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.loop import Arrays, Metrics
from trainspec.methods import full_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.recipe import Recipe
from trainspec.trace import Keep


@dataclass(frozen=True)
class State:
    """A run after `step` updates. The module and the optimizer are torch's: an update changes them in place."""

    step: int
    recipe: Recipe
    spec: ModelSpec
    model: LlamaForCausalLM
    engine: Engine
    optimizer: torch.optim.AdamW
    point: DropoutPoint


def init_state(recipe: Recipe, spec: ModelSpec) -> State:
    """The run before its first update. `parallel.start` comes first."""
    model = build_model(spec, policy=recipe.precision.policy, remat=recipe.plan.remat)
    point = attach(model, spec, recipe.method, seed=recipe.run.seed)
    from_canonical(starting_weights(recipe, spec), dict(model.named_parameters()))
    decays = {p.name: p.decay for p in trainable_table(spec, recipe.method)}
    parameters = _trainable(model)
    decayed = {name for name in parameters if decays[canonical_name(name)]}
    optimizer = make_optimizer(recipe.optimizer, decayed, parameters=parameters)
    engine = make_engine(recipe, model, optimizer)
    return State(0, recipe, spec, model, engine, optimizer, point)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, whatever the split
    into microbatches. Raises NonFiniteLossError before the update, with the weights as they were.
    """
    recordings: list[Recording] = []
    loss_sum = _accumulate_gradients(state, batch, recordings if keep == "activations" else None)
    gradients = {name: p.grad for name, p in _trainable(state.model).items() if p.grad is not None}
    grad_norm = global_norm(gradients).item()
    if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
        state.model.zero_grad()
        raise NonFiniteLossError(f"step {state.step + 1}: loss sum {loss_sum}, gradient norm {grad_norm}")
    metrics = Metrics(loss_sum, batch.target_tokens, grad_norm)
    if keep != "nothing":
        metrics = replace(metrics, gradients=to_canonical(gradients, _table(state)))
    if recordings:
        activations, activation_gradients = by_point(recordings)
        metrics = replace(metrics, activations=activations, activation_gradients=activation_gradients)
    set_learning_rate(state.optimizer, lr)
    state.engine.step()
    return replace(state, step=state.step + 1), metrics


def _accumulate_gradients(state: State, batch: Batch, recordings: list[Recording] | None) -> float:
    """Leave the batch's gradients in the parameters; returns the summed loss.

    Where there is a list of `recordings`, it gets one for every microbatch.
    """
    state.model.train()
    parts = batch.split(state.recipe.batch.accumulation)
    loss_sum = torch.zeros((), dtype=torch.float64, device=state.model.device)
    for index, part in enumerate(parts):
        state.point.step, state.point.rows = state.step, _tensor(state, part.rows)
        with nullcontext() if recordings is None else recorded(state.model) as recording:
            logits_BSV = state.engine.forward(**_inputs(state, part))
            part_loss, _ = token_loss(logits_BSV, _tensor(state, part.labels))
            state.engine.backward(part_loss / batch.target_tokens, is_last=index == len(parts) - 1)
        if recordings is not None and recording is not None:
            recordings.append(recording)
        loss_sum += part_loss.detach()
    return loss_sum.item()


@torch.no_grad()
def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """(loss sum, target tokens) of a batch, without dropout."""
    state.model.eval()
    logits_BSV = state.model(**_inputs(state, batch)).logits
    loss_sum, tokens = token_loss(logits_BSV, _tensor(state, batch.labels))
    return loss_sum.item(), int(tokens.item())


@torch.no_grad()
def logits(state: State, batch: Batch) -> NDArray[Any]:
    """The model's output [B, S, V], without dropout."""
    state.model.eval()
    return state.model(**_inputs(state, batch)).logits.cpu().numpy()


def weights_of(state: State, *, frozen: bool = False) -> Arrays:
    """Copies of the trained weights, and on request of the frozen ones, under their canonical names."""
    table = full_table(state.spec, state.recipe.method) if frozen else _table(state)
    return to_canonical(dict(state.model.named_parameters()), table)


def moments_of(state: State) -> tuple[Arrays, Arrays]:
    """Copies of Adam's first and second moments under their weights' canonical names."""
    first, second = moments(state.optimizer, _trainable(state.model))
    return to_canonical(first, _table(state)), to_canonical(second, _table(state))


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` moved to where `checkpoint` was saved; consumes `state`."""
    parameters = _trainable(state.model)
    first, second = moments(state.optimizer, parameters)
    for arrays, native in (
        (checkpoint.weights, parameters),
        (checkpoint.moment1, first),
        (checkpoint.moment2, second),
    ):
        from_canonical(((p, arrays[p.name]) for p in _table(state)), native)
    set_steps(state.optimizer, checkpoint.step)
    return replace(state, step=checkpoint.step)


def _table(state: State) -> tuple[Param, ...]:
    return trainable_table(state.spec, state.recipe.method)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _inputs(state: State, batch: Batch) -> dict[str, Tensor]:
    return {
        "input_ids": _tensor(state, batch.input_ids),
        "position_ids": _tensor(state, batch.positions),
        "attention_mask": attention_mask(_tensor(state, batch.segments)),
    }


def _tensor(state: State, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(state.model.device, torch.int64)
