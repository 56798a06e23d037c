"""The training loop, once for both backends: build, loop over steps, measure, report, trace, save.

A backend is its `step` module: any module with these functions will do, and the type checker holds both to them.
No numerics here; what a step does is the backend's.

Every process of a run goes through the same calls in the same order, as any of them may wait for the others; only
the leader has the console and writes files (but for the cache of tokens, which whoever comes first fills). What a person
can have wrong is looked at by all of them, before the first waits.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from trainspec import checkpoint
from trainspec.accelerators import Devices
from trainspec.causal import causal_order
from trainspec.checkpoint import Checkpoint
from trainspec.data import Batch, Dataset, open_dataset
from trainspec.hf import model_notes, resolve_model
from trainspec.identity import identity_of
from trainspec.methods import trainable_table
from trainspec.model import ModelSpec
from trainspec.pipeline import check_trains
from trainspec.plan import Backend as BackendName
from trainspec.plan import check_fits, check_supported
from trainspec.recipe import Recipe, Span, idle_settings
from trainspec.report import Reporter, Silent, StepReport, describe, opening
from trainspec.resume import check_goes_on
from trainspec.schedule import learning_rate
from trainspec.trace import Keep, StepTrace, TraceRequest, TraceWriter, check_free

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Metrics:
    """What one update leaves. `grad_norm`, `gradients` and the activations' gradients are taken before clipping.

    `gradients` (by canonical name), `activations` and `activation_gradients` (by point, [global_examples,
    sequence_tokens, ...]) are there where they were asked for. A gradient is that of the batch's mean token loss.
    """

    loss_sum: float
    tokens: int
    grad_norm: float
    gradients: Arrays | None = None
    activations: Arrays | None = None
    activation_gradients: Arrays | None = None


class HasStep(Protocol):
    """A state of training."""

    @property
    def step(self) -> int:
        """How many updates were made."""
        ...


S = TypeVar("S", bound=HasStep)


def check_plan(recipe: Recipe, backend: BackendName) -> None:
    """Raises PlanError where the backend cannot run the recipe's plan, or where it does not divide model or batch.

    A backend asks before it takes its devices, so that a person's mistake costs nothing.
    """
    check_supported(recipe.plan, recipe.precision.policy, backend)
    spec, _ = resolve_model(recipe.model)
    rows = recipe.batch
    check_fits(
        recipe.plan,
        spec,
        global_examples=rows.global_examples,
        accumulation=rows.accumulation,
        backend=backend,
    )
    if backend == "torch":
        check_trains(recipe.plan, spec, trainable_table(spec, recipe.method))


class Backend(Protocol[S]):
    """The functions of `jaxtrain.step` and `torchtrain.step`. Names of arrays are canonical, arrays are whole."""

    def init_state(self, recipe: Recipe, spec: ModelSpec) -> S:
        """The run before its first update."""
        ...

    def train_step(self, state: S, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[S, Metrics]:
        """One update; consumes `state`. Raises NonFiniteLossError before the update."""
        ...

    def eval_step(self, state: S, batch: Batch) -> tuple[float, int]:
        """Loss sum and target tokens, without dropout."""
        ...

    def weights_of(self, state: S, *, frozen: bool = False) -> Arrays:
        """Trained weights; with `frozen` all of them."""
        ...

    def moments_of(self, state: S) -> tuple[Arrays, Arrays]:
        """Adam's first and second moments."""
        ...

    def restore(self, state: S, checkpoint: Checkpoint) -> S:
        """`state` as it was when `checkpoint` was taken."""
        ...


def train(
    backend: Backend[S],
    recipe: Recipe,
    *,
    name: str,
    out: Path,
    trace: TraceRequest | None,
    resume: bool,
    allow: Collection[str],
    is_leader: bool,
    devices: Devices,
) -> None:
    """Train to the recipe's last step; leaves metrics and checkpoints in `out`, every gradient in `trace`'s directory.

    With `resume` from the newest checkpoint in `out`; `allow` names what may be another than it was made with.
    Raises UserError for what the recipe or its files have wrong, NonFiniteLossError where the loss is no number.
    """
    saved = checkpoint.start_from(out, resume=resume)
    if trace:
        check_free(trace.directory)
    if is_leader:  # before anything that takes long
        lines = [*opening(recipe, devices, name=name, out=out), *model_notes(recipe.model)]
        print("\n".join(lines), flush=True)
    spec, _ = resolve_model(recipe.model)
    dataset = open_dataset(recipe, "train")
    heldout = open_dataset(recipe, "heldout") if recipe.data.heldout else None
    span = recipe.span(lambda: dataset.rows)
    told = idle_settings(recipe, span)
    identity = identity_of(recipe, spec, dataset)
    if saved:
        made = checkpoint.read_made(saved)
        told += check_goes_on(made, recipe, identity, steps=span.steps, allow=allow)
    recipe = recipe.spanning(span)
    out.mkdir(parents=True, exist_ok=True)
    state = backend.init_state(recipe, spec)
    if saved:
        state = backend.restore(state, checkpoint.load(saved, recipe=recipe, model=spec))
    if is_leader:
        (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    writer = TraceWriter(trace.directory) if trace and is_leader else None
    if trace:
        start = backend.weights_of(state, frozen=True)
        if writer:
            writer.initial(start, causal_order(spec, recipe.method))
    last = span.last
    with (
        Reporter(out, backend=name, steps=last, resumed_at=state.step) if is_leader else Silent()
    ) as reporter:
        reporter.say(describe(spec, recipe.method, recipe.precision.policy))
        reporter.say(dataset.summary)
        reporter.say(span.said(rows=dataset.rows, examples=recipe.batch.global_examples))
        for line in told:
            reporter.say(line)
        if saved:
            done = "; nothing is left to do" if state.step >= last else ""
            reporter.say(f"going on behind step {state.step} of {last}, from {saved}{done}")
        while state.step < last:
            state, report = _update(backend, state, recipe, span, dataset, trace, writer)
            if heldout and _is_due(state.step, recipe.run.eval_every_steps, last):
                report = report.with_heldout(heldout_loss(backend, state, heldout, recipe))
            reporter.step(report)
            if _is_due(state.step, recipe.checkpoint.every_steps, last):
                saving = Checkpoint(state.step, backend.weights_of(state), *backend.moments_of(state))
                if is_leader:
                    checkpoint.save(out, saving, recipe=recipe, identity=identity)
        reporter.say(f"wrote {checkpoint.latest(out) or out}")


def evaluate(backend: Backend[S], recipe: Recipe, *, out: Path) -> tuple[float, str]:
    """Held-out loss per target token, and whose: the newest checkpoint's in `out`, or else the starting weights'."""
    spec, _ = resolve_model(recipe.model)
    heldout = open_dataset(recipe, "heldout")
    state = backend.init_state(recipe, spec)
    saved = checkpoint.latest(out)
    if saved:
        state = backend.restore(state, checkpoint.load(saved, recipe=recipe, model=spec))
    loss = heldout_loss(backend, state, heldout, recipe)
    if not saved:
        return loss, f"the starting weights (no checkpoint under {out})"
    made = checkpoint.read_made(saved).identity
    is_another = made is not None and made.tokenizer != heldout.tokenizer_digest
    note = "; the tokenizer's files are not those that it was trained with" if is_another else ""
    return loss, f"{out} at step {state.step}{note}"


def heldout_loss(backend: Backend[S], state: S, heldout: Dataset, recipe: Recipe) -> float:
    """Mean cross-entropy per target token over every held-out row."""
    rows = recipe.batch.global_examples // recipe.batch.accumulation
    parts = [backend.eval_step(state, batch) for batch in heldout.in_order(rows)]
    return sum(loss_sum for loss_sum, _ in parts) / sum(tokens for _, tokens in parts)


def _update(
    backend: Backend[S],
    state: S,
    recipe: Recipe,
    span: Span,
    dataset: Dataset,
    trace: TraceRequest | None,
    writer: TraceWriter | None,
) -> tuple[S, StepReport]:
    batch = dataset.batch(state.step, recipe.batch.global_examples)
    lr = learning_rate(recipe.schedule, peak=recipe.optimizer.lr, step=state.step, steps=span.steps)
    before = backend.weights_of(state) if trace else {}
    began = time.perf_counter()
    keep = trace.keep(state.step + 1) if trace else "nothing"
    state, metrics = backend.train_step(state, batch, lr=lr, keep=keep)
    seconds = time.perf_counter() - began
    if trace:
        left = _step_trace(backend, state, batch, metrics, lr=lr, before=before)
        if writer:
            writer.step(left)
    loss = metrics.loss_sum / metrics.tokens
    return state, StepReport(
        state.step, loss, metrics.tokens, metrics.grad_norm, lr, metrics.tokens / seconds
    )


def _step_trace(
    backend: Backend[S], state: S, batch: Batch, metrics: Metrics, *, lr: float, before: Arrays
) -> StepTrace:
    """What the update leaves for comparison; `before` are the weights that it started from."""
    after, (moment1, moment2) = backend.weights_of(state), backend.moments_of(state)
    return StepTrace(
        step=state.step,
        batch=batch,
        loss_sum=metrics.loss_sum,
        tokens=metrics.tokens,
        grad_norm=metrics.grad_norm,
        lr=lr,
        gradients=metrics.gradients or {},
        updates={name: after[name] - before[name] for name in after},
        moment1=moment1,
        moment2=moment2,
        activations=metrics.activations or {},
        activation_gradients=metrics.activation_gradients or {},
    )


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
