"""Who looks on while a run trains: the trace, the held-out loss, the report, the checkpoints.

Every process has the same observers in the same order and calls them at the same time, as what one asks of the backend
may wait for the other processes; only the leader's write. Another one (a profiler, say) is a class with what it
needs of these methods, and a line in `loop.train`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Generic, Protocol, TypeVar, get_args

from trainspec.runs import checkpoint
from trainspec.runs.checkpoint import Checkpoint
from trainspec.runs.contract import Arrays, Backend, Metrics, S
from trainspec.data import Batch, Dataset
from trainspec.runs.identity import Identity
from trainspec.recipe import Recipe
from trainspec.runs.report import Reporter, NullReporter, StepReport
from trainspec.trace import Keep, Named, StepTrace, TraceRequest, TraceWriter

State = TypeVar("State", contravariant=True)


@dataclass(frozen=True)
class Needs:
    """What an observer asks of an update before it is made: each is made once, whoever asks for it.

    `keep` is what the update's metrics have; `before` and `after` are the trained weights around it, `after` with the
    moments.
    """

    keep: Keep = "nothing"
    before: bool = False
    after: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What both ask for."""
        keeps: tuple[Keep, Keep] = (self.keep, other.keep)
        return Needs(
            max(keeps, key=get_args(Keep).index), self.before or other.before, self.after or other.after
        )


@dataclass(frozen=True)
class Update:
    """One update that was made, `step` counted from 1, with the arrays that were asked for by canonical name.

    `heldout_loss` is there where it was measured after the update.
    """

    step: int
    batch: Batch
    lr: float
    metrics: Metrics
    seconds: float
    weights_before: Arrays
    weights: Arrays
    moments: tuple[Arrays, Arrays]
    heldout_loss: float | None = None


class Observer(Protocol[State]):
    """Looks on at a run. A class that says so has only the methods that it needs: these do nothing."""

    def started(self, state: State) -> None:
        """Before the first update; a resumed run starts at its checkpoint."""
        return

    def needs(self, step: int) -> Needs:
        """What it asks of update `step`, counted from 1."""
        return Needs()

    def updated(self, state: State, update: Update) -> Update:
        """After an update; gives what the observers after it are told of it."""
        return update

    def finished(self) -> None:
        """At the run's end, whatever ended it."""
        return


def needs_of(observers: Iterable[Observer[S]], step: int) -> Needs:
    """What all of them ask of update `step`."""
    return reduce(Needs.__or__, (observer.needs(step) for observer in observers), Needs())


@dataclass(frozen=True)
class Due:
    """Which updates are due: every so many, and the last."""

    every_steps: int
    last: int

    def __call__(self, step: int) -> bool:
        """Whether update `step` is."""
        return step % self.every_steps == 0 or step == self.last


class TraceObserver(Observer[S]):
    """Leaves a trace of every update; `order` is the causal order of its names."""

    def __init__(
        self, backend: Backend[S], request: TraceRequest, order: Sequence[Named], *, is_leader: bool
    ) -> None:
        self._backend, self._request, self._order = backend, request, order
        self._writer = TraceWriter(request.directory) if is_leader else None

    def started(self, state: S) -> None:
        """Every weight, as the run starts."""
        weights = self._backend.weights_of(state, frozen=True)
        if self._writer:
            self._writer.initial(weights, self._order)

    def needs(self, step: int) -> Needs:
        """Everything; activations where they are wanted."""
        return Needs(self._request.keep(step), before=True, after=True)

    def updated(self, state: S, update: Update) -> Update:
        """Writes it."""
        if self._writer:
            self._writer.step(step_trace(update))
        return update


def step_trace(update: Update) -> StepTrace:
    """What an update leaves for comparison."""
    metrics, (moment1, moment2) = update.metrics, update.moments
    return StepTrace(
        step=update.step,
        batch=update.batch,
        loss_sum=metrics.loss_sum,
        tokens=metrics.tokens,
        grad_norm=metrics.grad_norm,
        lr=update.lr,
        gradients=metrics.gradients or {},
        updates={name: after - update.weights_before[name] for name, after in update.weights.items()},
        moment1=moment1,
        moment2=moment2,
        activations=metrics.activations or {},
        activation_gradients=metrics.activation_gradients or {},
    )


class EvaluationObserver(Observer[S]):
    """Measures the held-out loss after updates that are due."""

    def __init__(self, backend: Backend[S], heldout: Dataset, *, examples: int, due: Due) -> None:
        self._backend, self._heldout, self._examples, self._due = backend, heldout, examples, due

    def updated(self, state: S, update: Update) -> Update:
        """The update with its held-out loss."""
        if not self._due(update.step):
            return update
        return replace(update, heldout_loss=heldout_loss(self._backend, state, self._heldout, self._examples))


def heldout_loss(backend: Backend[S], state: S, heldout: Dataset, examples: int) -> float:
    """Mean cross-entropy per target token over every held-out example, `examples` at a time."""
    parts = [backend.eval_step(state, batch) for batch in heldout.in_order(examples)]
    return sum(loss_sum for loss_sum, _ in parts) / sum(tokens for _, tokens in parts)


class ReportObserver(Observer[S], Generic[S]):
    """A line for each update, with the held-out loss where it was measured."""

    def __init__(self, reporter: Reporter | NullReporter) -> None:
        self._reporter = reporter

    def updated(self, state: S, update: Update) -> Update:
        """Shows and records it."""
        metrics = update.metrics
        loss, speed = metrics.loss_sum / metrics.tokens, metrics.tokens / update.seconds
        self._reporter.step(
            StepReport(
                update.step, loss, metrics.tokens, metrics.grad_norm, update.lr, speed, update.heldout_loss
            )
        )
        return update


class CheckpointObserver(Observer[S], Generic[S]):
    """Leaves a checkpoint after updates that are due."""

    def __init__(self, out: Path, recipe: Recipe, identity: Identity, *, due: Due, is_leader: bool) -> None:
        self._out, self._recipe, self._identity = out, recipe, identity
        self._due, self._is_leader = due, is_leader

    def needs(self, step: int) -> Needs:
        """Weights and moments, where it is due."""
        return Needs(after=self._due(step))

    def updated(self, state: S, update: Update) -> Update:
        """Writes it, where it is due."""
        if self._is_leader and self._due(update.step):
            saving = Checkpoint(update.step, update.weights, *update.moments)
            checkpoint.save(self._out, saving, recipe=self._recipe, identity=self._identity)
        return update
