"""The observers of a run: trace, held-out loss, samples of answers, report, checkpoints.

Every process has the same observers in the same order and calls them at the same time, as what they ask of the backend
may be a collective; only the leader's write. A new one (a profiler, say) is a class with those of these methods that it
needs, and a line in `loop._observers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from typing import Generic, Protocol, TypeVar, get_args

from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.store import CheckpointStore
from trainspec.data import Batch, Dataset
from trainspec.errors import MachineError, Note, UserError
from trainspec.evaluation.loss import mean_loss
from trainspec.generation.generation import Prompt
from trainspec.generation.responder import Responder
from trainspec.plans.accelerators import Devices
from trainspec.plans.flops import Arithmetic
from trainspec.recipe import Recipe
from trainspec.runs.agreement import Agreement
from trainspec.step import Arrays, Backend, Metrics, S
from trainspec.trace import Keep, StepTrace, TraceName, TraceRequest, TraceWriter
from trainspec.trace_header import TraceHeader
from trainspec.training.report import NullReporter, Reporter, StepReport, Work

State = TypeVar("State", contravariant=True)
# How long a process that failed waits for a save in flight: those that it needs for it may be gone.
_PEERS_SECONDS = 10.0


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

    `heldout_loss` is None where it was not measured after the update, `checkpoint_seconds`, for which the run waited to have
    a checkpoint begun, where none was.
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
    checkpoint_seconds: float | None = None


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

    def stopped(self, state: State, unmade: Update | None) -> None:
        """Called where the run stops before its last update, with the state after its last one.

        It was asked to, or loss or gradient is not finite: then `unmade` is the update that is not made, without weights.
        """
        return

    def finished(self, error: BaseException | None) -> None:
        """Called at the end of the run, with the error that ends it, if any."""
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

    def stopped(self, state: S, unmade: Update | None) -> None:
        """Writes what a step left that is not finite."""
        if self._writer and unmade:
            self._writer.stopped(step_trace(unmade))


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
    """Measures the held-out loss after due updates, unless the run is asked to stop."""

    name = "evaluation"

    def __init__(
        self,
        backend: Backend[S],
        heldout: Dataset,
        *,
        examples: int,
        due: Due,
        agreement: Agreement | None = None,
    ) -> None:
        self._backend, self._heldout, self._examples, self._due = backend, heldout, examples, due
        self._agreement = agreement or Agreement()

    def updated(self, state: S, update: Update) -> Update:
        """The update with its held-out loss, or without it where the run stops first."""
        if not self._due(update.step):
            return update
        sums = []
        for batch in self._heldout.in_order(self._examples):
            if self._agreement.is_stopping():
                return update
            sums.append(self._backend.eval_step(state, batch))
        return replace(update, heldout_loss=mean_loss(sums))


class SampleObserver(Observer[S], Generic[S]):
    """Answers some prompts after due updates, unless the run is asked to stop: the answers of one update are reported whole."""

    name = "samples"

    def __init__(
        self,
        responder: Responder[S],
        prompts: Sequence[Prompt],
        reporter: Reporter | NullReporter,
        *,
        due: Due,
        agreement: Agreement | None = None,
    ) -> None:
        self._responder, self._prompts, self._reporter, self._due = responder, prompts, reporter, due
        self._agreement = agreement or Agreement()

    def updated(self, state: S, update: Update) -> Update:
        """Answers the prompts with the state after the update."""
        is_stopping = self._agreement.is_stopping
        if not self._due(update.step) or is_stopping():
            return update
        made = [
            generation
            for batch in self._responder.respond(state, self._prompts, is_stopping=is_stopping)
            for generation in batch
        ]
        if len(made) == len(self._prompts):
            self._reporter.samples(update.step, made)
        return update


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
                update.checkpoint_seconds,
            )
        )
        if speed:
            self._total += work
        if update.step == self._last and self._total.seconds:
            self._reporter.say(f"after the first update: {self._total.speed()}")
        return update


class CheckpointObserver(Observer[S], Generic[S]):
    """Saves a checkpoint after due updates, while the next updates are made, and one where the run stops."""

    name = "checkpoint"

    def __init__(
        self,
        store: CheckpointStore[S],
        *,
        due: Due,
        agreement: Agreement | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._store, self._due, self._agreement, self._say = store, due, agreement or Agreement(), say
        self._saved_step = 0
        self._heldout_loss: float | None = None

    def started(self, state: S) -> None:
        """What the run starts from is saved, or the recipe makes it again."""
        self._saved_step = state.step
        self._store.prepare(state)

    def updated(self, state: S, update: Update) -> Update:
        """Begins to save a due update; the update with the seconds for which that kept the run."""
        self._heldout_loss = update.heldout_loss
        self._report()
        if not self._due(update.step) and not self._agreement.is_due:
            return update
        began = time.perf_counter()
        self._save(state)
        return replace(update, checkpoint_seconds=time.perf_counter() - began)

    def stopped(self, state: S, unmade: Update | None) -> None:
        """Saves the last finished update, unless it is saved, and waits until it is complete."""
        if state.step > self._saved_step:
            self._save(state)
        self._agreement.finish(lambda: self._store.wait(is_last=True))

    def finished(self, error: BaseException | None) -> None:
        """Waits for the save in flight, but not where the user ends the run at once."""
        if isinstance(error, KeyboardInterrupt):
            return
        may_be_gone = error is not None and not self._agreement.is_alone
        try:
            self._store.wait(_PEERS_SECONDS if may_be_gone else None, is_last=True)
        except (OSError, MachineError, UserError) as unsaved:
            if error is None:
                raise
            error.add_note(Note(f"a checkpoint was not finished: {unsaved}"))
        self._report()

    def _report(self) -> None:
        """Say what has failed that does not end the run."""
        for line in self._store.forgiven():
            self._say(line)

    def _save(self, state: S) -> None:
        """Begin to save a state, or save it; where an earlier save has failed in one process, no process begins."""
        self._agreement.finish(self._store.wait)
        self._report()
        self._store.save(state, heldout_loss=self._heldout_loss)
        self._saved_step = state.step
        self._agreement.saved()
        if not self._store.is_asynchronous:
            self._agreement.finish(self._store.wait)
