"""The training loop, once for both backends: build, update step by step, and let the observers look on.

A backend is its `step` module: any module with the functions of `contract.Backend` will do, and the type checker holds
both to them. No numerics here; what a step does is the backend's.

Every process of a run goes through the same calls in the same order, as any of them may wait for the others; only
the leader has the console and writes files. Exception: any process may fill the cache of tokens. All of them check what
a user can have wrong before the first waits.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from trainspec.runs import checkpoint
from trainspec.plans.accelerators import Devices
from trainspec.backends import BACKENDS
from trainspec.causal import causal_order
from trainspec.runs.contract import Backend, S
from trainspec.data import Batch, open_dataset
from trainspec.files.hf import model_notes
from trainspec.runs.observers import (
    Due,
    EvaluationObserver,
    Observer,
    ReportObserver,
    CheckpointObserver,
    TraceObserver,
    Update,
    heldout_loss,
    needs_of,
)
from trainspec.runs.prefetch import prefetch
from trainspec.recipe import idle_settings
from trainspec.runs.report import Reporter, NullReporter, describe, opening
from trainspec.runs.request import TrainRequest
from trainspec.runs.resume import check_resumable
from trainspec.runs.run import Run
from trainspec.runs.run_data import RunData, open_data
from trainspec.schedule import learning_rate
from trainspec.trace import check_free


def train(backend: Backend[S], run: Run, request: TrainRequest, *, is_leader: bool, devices: Devices) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints, and every gradient where a trace is wanted.

    Raises UserError for what the recipe or its files have wrong, NonFiniteLossError where the loss is no number.
    """
    out, program = request.out, BACKENDS[devices.backend].program
    saved = checkpoint.resumable_checkpoint(out, resume=request.resume)
    if request.trace:
        check_free(request.trace.directory)
    if is_leader:  # before anything that takes long
        lines = opening(run.recipe, devices, name=program, out=out)
        print("\n".join([*lines, *model_notes(run.recipe.model, run.spec, run.directory)]), flush=True)
    run, data = open_data(run)
    lines = _summary(run, data, saved, request.allow)
    state, last = _started(backend, run, out, saved, is_leader=is_leader), data.span.last
    with (
        Reporter(out, backend=program, steps=last, resumed_at=state.step) if is_leader else NullReporter()
    ) as reporter:
        for line in [*lines, *_resumed(state.step, last, saved)]:
            reporter.say(line)
        follow(
            backend, run, data, state, _observers(backend, run, data, reporter, request, is_leader=is_leader)
        )
        reporter.say(f"wrote {checkpoint.latest(out) or out}")


def follow(backend: Backend[S], run: Run, data: RunData, state: S, observers: Sequence[Observer[S]]) -> S:
    """Make the run's updates from `state` to its last, with the observers looking on; the next batch is made meanwhile."""
    recipe, span = run.recipe, data.span
    steps, examples = range(state.step, span.last), recipe.batch.global_examples
    with ExitStack() as stack, prefetch(lambda step: data.train.batch(step, examples), steps) as batches:
        for observer in observers:
            stack.callback(observer.finished)
            observer.started(state)
        for batch in batches:
            lr = learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=state.step, steps=span.steps)
            state, update = _update(backend, state, batch, lr, observers)
            for observer in observers:
                update = observer.updated(state, update)
    return state


def _update(
    backend: Backend[S], state: S, batch: Batch, lr: float, observers: Sequence[Observer[S]]
) -> tuple[S, Update]:
    needs = needs_of(observers, state.step + 1)
    before = backend.weights_of(state) if needs.before else {}
    began = time.perf_counter()
    state, metrics = backend.train_step(state, batch, lr=lr, keep=needs.keep)
    seconds = time.perf_counter() - began
    weights, moments = (
        (backend.weights_of(state), backend.moments_of(state)) if needs.after else ({}, ({}, {}))
    )
    return state, Update(state.step, batch, lr, metrics, seconds, before, weights, moments)


def _observers(
    backend: Backend[S],
    run: Run,
    data: RunData,
    reporter: Reporter | NullReporter,
    request: TrainRequest,
    *,
    is_leader: bool,
) -> list[Observer[S]]:
    """Those of a run, in the order in which they are told of an update."""
    recipe, last = run.recipe, data.span.last
    found: list[Observer[S]] = []
    if request.trace:
        order = causal_order(run.spec, recipe.method)
        found.append(TraceObserver(backend, request.trace, order, is_leader=is_leader))
    if data.heldout:
        due = Due(recipe.run.eval_every_steps, last)
        found.append(EvaluationObserver(backend, data.heldout, examples=_heldout_examples(run), due=due))
    found.append(ReportObserver(reporter))
    due = Due(recipe.checkpoint.every_steps, last)
    return [*found, CheckpointObserver(request.out, recipe, data.identity, due=due, is_leader=is_leader)]


def _summary(run: Run, data: RunData, saved: Path | None, allow: Collection[str]) -> list[str]:
    """What is said of the run before it trains. Raises RecipeError where it may not resume from `saved`."""
    recipe, span, lines = run.recipe, data.span, [describe(run)]
    lines += [data.train.summary, span.describe(examples=data.train.num_examples, global_examples=recipe.batch.global_examples)]
    lines += idle_settings(recipe, span)
    if saved:
        made = checkpoint.read_origin(saved)
        lines += check_resumable(made, recipe, data.identity, steps=span.steps, allow=allow)
    return lines


def _resumed(step: int, last: int, saved: Path | None) -> list[str]:
    """What is said of a run that starts from a checkpoint."""
    done = "; nothing is left to do" if step >= last else ""
    return [f"resuming after step {step} of {last}, from {saved}{done}"] if saved else []


def _started(backend: Backend[S], run: Run, out: Path, saved: Path | None, *, is_leader: bool) -> S:
    """The run before its next update: at its start, or at a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    state = backend.init_state(run)
    if saved:
        state = backend.restore(state, checkpoint.load(saved, run))
    if is_leader:
        (out / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    return state


def evaluate(backend: Backend[S], run: Run, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and whose: the newest checkpoint's in `out`, or else the starting weights'."""
    heldout = open_dataset(run, "heldout")
    state = backend.init_state(run)
    saved = checkpoint.latest(out)
    if saved:
        state = backend.restore(state, checkpoint.load(saved, run))
    loss = heldout_loss(backend, state, heldout, _heldout_examples(run))
    if not saved:
        return loss, f"the starting weights (no checkpoint under {out})"
    made = checkpoint.read_origin(saved).identity
    is_another = made is not None and made.tokenizer != heldout.tokenizer_digest
    note = "; the tokenizer's files are not those that it was trained with" if is_another else ""
    return loss, f"{out} at step {state.step}{note}"


def _heldout_examples(run: Run) -> int:
    """As many at a time as training has in memory: an accumulation slice."""
    return run.recipe.batch.global_examples // run.recipe.batch.accumulation
