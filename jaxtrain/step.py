"""State in, state out: one update on one global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxtrain.activations import by_point
from jaxtrain.decoding import CachedRows
from jaxtrain.mesh import make_mesh
from jaxtrain.optim import Moments, rates
from jaxtrain.program import Program, StepGradients
from jaxtrain.rounding import Draw
from jaxtrain.weights import Arrays, native_name, to_host
from trainspec.causal import activation_points
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import KINDS, ArrayKind, Shard
from trainspec.checkpoints.states import ArrayFormat
from trainspec.data import Batch
from trainspec.errors import NonFiniteLossError
from trainspec.init import starting_weights
from trainspec.rng import name_key
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Decoding, Metrics, Roundings
from trainspec.trace import Keep
from trainspec.weight import WeightLike


@dataclass(frozen=True)
class State:
    """A run after `step` updates. Frozen weights have no gradients and no moments.

    In bf16 `trainable` is a bfloat16 copy of the float32 weights in `master`, for computing; otherwise `master` is empty.
    """

    step: int
    trainable: Arrays
    frozen: Arrays
    master: Arrays
    moments: Moments
    program: Program


def init_state(run: Run, *, like: State | None = None) -> State:
    """The run before its first update. Reuses the compiled programs of `like`, a state of an equal recipe."""
    program = like.program if like else Program(run, make_mesh(run.recipe.plan))
    storage = program.storage
    trained = {native_name(p)[0] for p in run.trained}
    entries = [(p, weight, native_name(p)[0] in trained) for p, weight in starting_weights(run)]
    frozen = storage.load(
        ((p, w) for p, w, is_trained in entries if not is_trained), "weights", storage.compute_dtype
    )
    frozen |= program.feeder.constants(program.constants)
    trainable, master = storage.load_trained((p, w) for p, w, is_trained in entries if is_trained)
    moments = storage.zero_moments(master or trainable, program.optimizer)
    return State(0, trainable, frozen, master, moments, program)


def feed(state: State, batch: Batch) -> Batch:
    """The batch on the devices, as `train_step` takes it."""
    return state.program.feeder.ahead(batch)


def train_step(state: State, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[State, Metrics]:
    """One update on a global batch; consumes `state`.

    The gradient is that of the batch's summed loss divided by its number of target tokens, however the batch is split.
    `keep` says what the metrics have; with "nothing" the update is one compiled program. Raises NonFiniteLossError before
    the update, with `state` as it was.
    """
    program = state.program
    scalars = rates(program.recipe.optimizer, lr=lr, step=state.step)
    stacked, step = program.feeder.slices(batch), jnp.int32(state.step)
    if keep == "nothing":
        result, updated = program.train(
            state.trainable, state.frozen, state.master, state.moments, stacked, step, scalars
        )
        return _checked(state, result, updated)
    result = program.gradients(
        state.trainable, state.frozen, stacked, step, record_activations=keep == "activations"
    )
    metrics = _metrics(program, result, keep)
    _check_finite(metrics, state.step + 1)
    updated = program.update(
        state.trainable, state.master, state.moments, result.gradients, result.norm, scalars
    )
    # Nothing of the update is left to the next one's time.
    trainable, master, moments = jax.block_until_ready(updated)
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def gradients_of(
    state: State, batch: Batch, *, keep: Keep, roundings: Roundings | None = None, draw: int = 0
) -> Metrics:
    """Loss and gradients of a global batch; `state` stays as it is. Raises NonFiniteLossError.

    With `roundings` they are those of a run that rounds every result, as `draw` says (float64 runs only).
    """
    program = state.program
    stacked, step = program.feeder.slices(batch), jnp.int32(state.step)
    arguments, record = (state.trainable, state.frozen, stacked, step), keep == "activations"
    if roundings is None:
        result = program.gradients(*arguments, record_activations=record)
    else:
        drawn = _draw(state, draw)
        result = program.rounded_gradients(*arguments, drawn, roundings=roundings, record_activations=record)
    metrics = _metrics(program, result, keep)
    _check_finite(metrics, state.step + 1)
    return metrics


def _draw(state: State, number: int) -> Draw:
    return Draw.numbered(number, name_key(number, "roundings", str(state.step))[0])


def _checked(
    state: State, result: StepGradients, updated: tuple[Arrays, Arrays, Moments]
) -> tuple[State, Metrics]:
    """The state and metrics after `Program.train`. Raises NonFiniteLossError, with `state` as it was."""
    trainable, master, moments = updated
    metrics = Metrics(float(result.loss_sum), int(result.tokens), float(result.norm))
    try:
        _check_finite(metrics, state.step + 1)
    except NonFiniteLossError:
        # The program has consumed the state's arrays and returned them unchanged.
        consumed = (state.trainable, state.master, state.moments.moment1, state.moments.moment2)
        for arrays, returned in zip(consumed, (trainable, master, *moments), strict=True):
            arrays.update(returned)
        raise
    return replace(state, step=state.step + 1, trainable=trainable, master=master, moments=moments), metrics


def _check_finite(metrics: Metrics, step: int) -> None:
    loss_sum, norm = metrics.loss_sum, metrics.grad_norm
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        raise NonFiniteLossError(f"step {step}: loss sum {loss_sum}, gradient norm {norm}", metrics)


def _metrics(program: Program, result: StepGradients, keep: Keep) -> Metrics:
    metrics = Metrics(float(result.loss_sum), int(result.tokens), float(result.norm))
    metrics = replace(metrics, gradients=program.storage.canonical(result.gradients, program.run.trained))
    if keep == "gradients":
        return metrics
    points = [point.full_name for point in activation_points(program.run.spec, program.recipe.method)]
    recorded = (
        by_point({name: to_host(arrays[name]) for name in sorted(arrays)})
        for arrays in (result.activations, result.activation_gradients)
    )
    # Of a stack that is a target in some layers only, the others are left out.
    activations, gradients = ({point: arrays[point] for point in points} for arrays in recorded)
    return replace(metrics, activations=activations, activation_gradients=gradients)


def eval_step(state: State, batch: Batch) -> tuple[float, int]:
    """Loss sum and target tokens of a batch, without dropout."""
    loss_sum, tokens = state.program.evaluate(
        state.trainable | state.frozen, state.program.feeder.feed(batch)
    )
    return float(loss_sum), int(tokens)


def logits(state: State, batch: Batch, *, roundings: Roundings | None = None, draw: int = 0) -> NDArray[Any]:
    """The model's output [B, S, vocab], without dropout.

    With `roundings` that of a run that rounds every result, as `draw` says (float64 runs only).
    """
    program = state.program
    arguments = state.trainable | state.frozen, program.feeder.feed(batch)
    if roundings is None:
        return to_host(program.logits(*arguments))
    return to_host(program.rounded_logits(*arguments, _draw(state, draw), roundings=roundings))


def next_logits(state: State, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
    """The logits [B, vocab] after position `last` [B] of each row, without dropout."""
    program = state.program
    weights, fed = state.trainable | state.frozen, program.feeder.feed(batch)
    return to_host(program.next_logits(weights, fed, program.feeder.replicated(last)))


def decoding(state: State, *, length: int) -> Decoding | None:
    """A cache for rows of up to `length` tokens; None where a pipeline has the layers."""
    program = state.program
    if program.cached is None:
        return None
    return CachedRows(program.cached, state.trainable | state.frozen, program.feeder, length=length)


def weights_of(state: State, *, frozen: bool = False) -> dict[str, NDArray[Any]]:
    """Copies of the trained weights (the masters), with `frozen` of all weights, by canonical name."""
    program = state.program
    table = program.run.full_table if frozen else program.run.trained
    return program.storage.canonical(state.frozen | (state.master or state.trainable), table)


def moments_of(state: State) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """AdamW's first and second moments by canonical name."""
    storage, moments, trained = state.program.storage, state.moments, state.program.run.trained
    return storage.canonical(moments.moment1, trained), storage.canonical(moments.moment2, trained)


def arrays_of(state: State) -> dict[ArrayKind, Arrays]:
    """The native arrays of a checkpoint: the trained weights (the masters) and both moments."""
    moments = state.moments
    return {
        "weights": state.master or state.trainable,
        "moment1": moments.moment1,
        "moment2": moments.moment2,
    }


def shards_of(state: State, copy: Copy = np.copy) -> Iterator[Shard]:
    """Copies of what this process saves of weights and moments."""
    program = state.program
    return program.storage.shards(arrays_of(state), program.run.trained, copy)


def copied_bytes(state: State) -> list[int]:
    """The size of each array that `shards_of` gives to `copy`; none where the devices are not the cores."""
    program = state.program
    return program.storage.copied_bytes(arrays_of(state), program.run.trained)


def restore(state: State, checkpoint: Checkpoint) -> State:
    """`state` as it was when the checkpoint was saved; consumes `state`."""
    storage, trained = state.program.storage, state.program.run.trained

    def load(kind: ArrayKind) -> Arrays:
        weights: Mapping[str, WeightLike] = getattr(checkpoint, kind)
        return storage.load_saved(((p, weights[p.name]) for p in trained), kind)

    return _replaced(state, checkpoint.step, lambda: {kind: load(kind) for kind in KINDS})


def _replaced(state: State, step: int, load: Callable[[], Mapping[ArrayKind, Arrays]]) -> State:
    """`state` with the arrays that `load` gives. Its own are freed first: two states at once would need twice the memory."""
    for arrays in (state.trainable, state.master, *state.moments):
        for array in arrays.values():
            array.delete()
    loaded = load()
    trainable, master = state.program.storage.with_masters(loaded["weights"])
    moments = Moments(loaded["moment1"], loaded["moment2"])
    return replace(state, step=step, trainable=trainable, master=master, moments=moments)


def native_format(run: Run, processes: Processes) -> ArrayFormat[State]:
    """Checkpoints of orbax."""
    # Most runs do without.
    from jaxtrain.native import NativeFormat

    return NativeFormat(
        run,
        processes,
        storage_of=lambda state: state.program.storage,
        arrays_of=arrays_of,
        replaced=_replaced,
    )
