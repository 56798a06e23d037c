"""The observers of a run: trace, held-out loss, report, checkpoints.

Every process has the same observers in the same order and calls them at the same time, as what they ask of the backend
may be a collective; only the leader's write. A new one (a profiler, say) is a class with those of these methods that it
needs, and a line in `loop._observers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from typing import Generic, Protocol, TypeVar, get_args

from trainspec.checkpoints.store import CheckpointStore
from trainspec.data import Batch, Dataset
from trainspec.plans.accelerators import Devices
from trainspec.plans.flops import Arithmetic
from trainspec.recipe import Recipe
from trainspec.runs.contract import Arrays, Backend, Metrics, S
from trainspec.runs.identity import Identity
from trainspec.runs.report import NullReporter, Reporter, StepReport, Work
from trainspec.trace import Keep, StepTrace, TraceName, TraceRequest, TraceWriter
from trainspec.trace_header import TraceHeader

State = TypeVar("State", contravariant=True)


@dataclass(frozen=True)
class Needs:
    """What an observer requires of an update; each item is computed once for all observers.

    `keep`: what the metrics hold. `before`, `after`: the trained weights before and after the update, `after` with the
    moments.
    """

    keep: Keep = "nothing"
    before: bool = False
    after: bool = False

    def __or__(self, other: Needs) -> Needs:
        """The union of both."""
        keeps: tuple[Keep, Keep] = (self.keep, other.keep)
        return Needs(
            max(keeps, key=get_args(Keep).index), self.before or other.before, self.after or other.after
        )


@dataclass(frozen=True)
class StepTime:
    """How many seconds an update took, and how many its batch was waited for before it.

    The process's first compiles programs and takes memory: it is no measure of the others.
    """

    seconds: float
    waited: float = 0.0
    is_first: bool = True


@dataclass(frozen=True)
class Update:
    """One finished update, `step` counted from 1, with the requested arrays by canonical name.

    `heldout_loss` is None where it was not measured after the update.
    """

    step: int
    batch: Batch
    lr: float
    metrics: Metrics
    time: StepTime
    weights_before: Arrays
    weights: Arrays
    moments: tuple[Arrays, Arrays]
    heldout_loss: float | None = None


class Observer(Protocol[State]):
    """Is notified of a run's progress. A subclass overrides the methods that it needs; these do nothing.

    `name` is what its time is listed as.
    """

    name: str = "observer"

    def started(self, state: State) -> None:
        """Called before the first update; `state` may come from a checkpoint."""
        return

    def needs(self, step: int) -> Needs:
        """What it requires of update `step`, counted from 1."""
        return Needs()

    def updated(self, state: State, update: Update) -> Update:
        """Called after an update. Returns the update for the next observers, to which it may add."""
        return update

    def stopped(self, update: Update) -> None:
        """Called where loss or gradient is not finite: the update is not made and has no weights, and the run ends."""
        return

    def finished(self) -> None:
        """Called at the end of the run, after an error too."""
        return


def needs_of(observers: Iterable[Observer[S]], step: int) -> Needs:
    """What all observers together require of update `step`."""
    return reduce(Needs.__or__, (observer.needs(step) for observer in observers), Needs())


@dataclass(frozen=True)
class Due:
    """Which updates are due: every `every_steps`-th, and the last."""

    every_steps: int
    last: int

    def __call__(self, step: int) -> bool:
        """Whether update `step` is due."""
        return step % self.every_steps == 0 or step == self.last


class TraceObserver(Observer[S]):
    """Writes every update to a trace, and a step that ends the run before its update.

    `order` is the causal order of its names, `header` what the run is.
    """

    name = "trace"

    def __init__(
        self,
        backend: Backend[S],
        request: TraceRequest,
        order: Sequence[TraceName],
        *,
        is_leader: bool,
        header: TraceHeader | None = None,
    ) -> None:
        self._backend, self._request, self._order = backend, request, order
        self._header = header or TraceHeader()
        self._writer = TraceWriter(request.directory) if is_leader else None

    def started(self, state: S) -> None:
        """Writes the weights that the run starts from, and after a resume the moments."""
        weights = self._backend.weights_of(state, frozen=True)
        moments = self._backend.moments_of(state) if state.step else None
        if self._writer:
            header = replace(self._header, first_step=state.step + 1)
            self._writer.initial(weights, self._order, moments=moments, header=header)

    def needs(self, step: int) -> Needs:
        """Everything; activations only where they are requested."""
        return Needs(self._request.keep(step), before=True, after=True)

    def updated(self, state: S, update: Update) -> Update:
        """Writes the update."""
        if self._writer:
            self._writer.step(step_trace(update))
        return update

    def stopped(self, update: Update) -> None:
        """Writes what the step left."""
        if self._writer:
            self._writer.stopped(step_trace(update))


def trace_header(recipe: Recipe, identity: Identity, devices: Devices) -> TraceHeader:
    """What a run is, as its trace states it."""
    return TraceHeader(
        policy=recipe.precision.policy,
        reduce=recipe.precision.reduce,
        backend=devices.backend,
        versions={package: version(package) for package in devices.packages},
        plan=recipe.plan.model_dump(mode="json"),
        method=recipe.method.model_dump(mode="json"),
        identity=asdict(identity),
    )


def step_trace(update: Update) -> StepTrace:
    """An update as a trace records it."""
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
    """Measures the held-out loss after due updates."""

    name = "evaluation"

    def __init__(self, backend: Backend[S], heldout: Dataset, *, examples: int, due: Due) -> None:
        self._backend, self._heldout, self._examples, self._due = backend, heldout, examples, due

    def updated(self, state: S, update: Update) -> Update:
        """The update with its held-out loss."""
        if not self._due(update.step):
            return update
        return replace(update, heldout_loss=heldout_loss(self._backend, state, self._heldout, self._examples))


def heldout_loss(backend: Backend[S], state: S, heldout: Dataset, examples: int) -> float:
    """Mean cross-entropy per target token over every held-out example, `examples` at a time."""
    sums = [backend.eval_step(state, batch) for batch in heldout.in_order(examples)]
    return sum(loss_sum for loss_sum, _ in sums) / sum(tokens for _, tokens in sums)


class ReportObserver(Observer[S], Generic[S]):
    """Reports every update, with the held-out loss where it was measured, and after the last one the average speed."""

    name = "report"

    def __init__(self, reporter: Reporter | NullReporter, arithmetic: Arithmetic, *, last: int) -> None:
        self._reporter, self._arithmetic, self._last = reporter, arithmetic, last
        self._total = Work()

    def updated(self, state: S, update: Update) -> Update:
        """Reports the update."""
        metrics, time, batch = update.metrics, update.time, update.batch
        work = Work(
            metrics.tokens,
            batch.tokens,
            self._arithmetic.operations(batch.segments),
            time.seconds,
            time.waited,
        )
        speed = None if time.is_first else work.speed()
        loss = metrics.loss_sum / metrics.tokens
        self._reporter.step(
            StepReport(
                update.step,
                loss,
                metrics.tokens,
                metrics.grad_norm,
                update.lr,
                time.seconds,
                speed,
                update.heldout_loss,
            )
        )
        if speed:
            self._total += work
        if update.step == self._last and self._total.seconds:
            self._reporter.say(f"after the first update: {self._total.speed()}")
        return update


class CheckpointObserver(Observer[S], Generic[S]):
    """Saves a checkpoint after due updates, while the next updates are made."""

    name = "checkpoint"

    def __init__(self, store: CheckpointStore[S], *, due: Due) -> None:
        self._store, self._due = store, due

    def updated(self, state: S, update: Update) -> Update:
        """Begins to save a due update. Raises the error of an earlier save."""
        self._store.check()
        if self._due(update.step):
            self._store.save(state, heldout_loss=update.heldout_loss)
        return update

    def finished(self) -> None:
        """Waits for the save in flight."""
        self._store.wait()
