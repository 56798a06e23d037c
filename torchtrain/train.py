"""A run from its recipe: build, loop, evaluate, report, save. No numerics here."""

from __future__ import annotations

from pathlib import Path

from torchtrain.parallel import finish, start
from torchtrain.step import (
    Arrays,
    Metrics,
    State,
    eval_step,
    init_state,
    moments_of,
    restore,
    train_step,
    weights_of,
)
from trainspec import checkpoint
from trainspec.data import Batch, Dataset, open_dataset
from trainspec.hf import resolve_model
from trainspec.plan import check_supported
from trainspec.recipe import Recipe
from trainspec.report import Reporter, StepReport, describe
from trainspec.schedule import learning_rate
from trainspec.trace import StepTrace, TraceWriter


def train(recipe: Recipe, *, out: Path, trace: Path | None, resume: bool) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints in `out`, every gradient in `trace`.

    Raises NonFiniteLossError where the loss is not finite, before that update.
    """
    check_supported(recipe.plan, recipe.precision.policy, "torch")
    saved = checkpoint.start_from(out, resume=resume)
    start(recipe)
    try:
        _train(recipe, out=out, trace=trace, saved=saved)
    finally:
        finish()


def _train(recipe: Recipe, *, out: Path, trace: Path | None, saved: Path | None) -> None:
    spec, _ = resolve_model(recipe.model)
    dataset = open_dataset(recipe, "train")
    heldout = open_dataset(recipe, "heldout") if recipe.data.heldout else None
    state = init_state(recipe, spec)
    if saved:
        state = restore(state, checkpoint.load(saved, recipe=recipe, model=spec))
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    last, writer = recipe.run.last_step, _open_trace(trace, state)
    with Reporter(out, backend="torch", steps=last, resumed_at=state.step) as reporter:
        reporter.say(describe(spec, recipe.method))
        reporter.say(dataset.summary)
        for step in range(state.step, last):
            batch = dataset.batch(step, recipe.batch.global_examples)
            lr = learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=step, steps=recipe.run.steps)
            before = weights_of(state) if writer else {}
            state, metrics = train_step(state, batch, lr=lr, keep_gradients=writer is not None)
            if writer:
                writer.step(_step_trace(state, batch, metrics, lr=lr, before=before))
            measure = heldout and _is_due(state.step, recipe.run.eval_every_steps, last)
            reporter.step(_report(metrics, state, lr=lr, heldout=heldout if measure else None))
            if _is_due(state.step, recipe.checkpoint.every_steps, last):
                checkpoint.save(out, _checkpoint(state), recipe=recipe)


def evaluate(recipe: Recipe, *, out: Path) -> float:
    """Held-out loss per target token of the newest checkpoint in `out`, or else of the starting weights."""
    check_supported(recipe.plan, recipe.precision.policy, "torch")
    start(recipe)
    try:
        spec, _ = resolve_model(recipe.model)
        heldout = open_dataset(recipe, "heldout")
        state = init_state(recipe, spec)
        saved = checkpoint.latest(out)
        if saved:
            state = restore(state, checkpoint.load(saved, recipe=recipe, model=spec))
        return heldout_loss(state, heldout)
    finally:
        finish()


def heldout_loss(state: State, heldout: Dataset) -> float:
    """Mean cross-entropy per target token over every held-out row, without dropout."""
    batch = state.recipe.batch
    pairs = [eval_step(state, rows) for rows in heldout.in_order(batch.global_examples // batch.accumulation)]
    return sum(loss_sum for loss_sum, _ in pairs) / sum(tokens for _, tokens in pairs)


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _report(metrics: Metrics, state: State, *, lr: float, heldout: Dataset | None) -> StepReport:
    loss = metrics.loss_sum / metrics.tokens
    measured = heldout_loss(state, heldout) if heldout else None
    return StepReport(state.step, loss, metrics.tokens, metrics.grad_norm, lr, measured)


def _checkpoint(state: State) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint(state.step, weights_of(state), *moments_of(state))


def _open_trace(directory: Path | None, state: State) -> TraceWriter | None:
    if directory is None:
        return None
    writer = TraceWriter(directory)
    writer.initial(weights_of(state, frozen=True))
    return writer


def _step_trace(state: State, batch: Batch, metrics: Metrics, *, lr: float, before: Arrays) -> StepTrace:
    assert metrics.gradients is not None  # kept, as there is a trace
    after, (moment1, moment2) = weights_of(state), moments_of(state)
    return StepTrace(
        step=state.step,
        batch=batch,
        loss_sum=metrics.loss_sum,
        tokens=metrics.tokens,
        grad_norm=metrics.grad_norm,
        lr=lr,
        gradients=metrics.gradients,
        updates={name: after[name] - before[name] for name in after},
        moment1=moment1,
        moment2=moment2,
    )
