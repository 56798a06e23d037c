"""The training loop of both backends: prepare a run, update it step by step, and notify the observers.

A backend is its `step` module: any module with the functions of `trainspec.step.Backend`, to which the type checker holds
both. There are no numerics here.

All processes of a run make the same calls in the same order, as any call may be a collective; only the leader uses the
console and writes files. Exception: any process may fill the token cache. All processes validate user input before the
first collective.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Generic

from trainspec.backends import BACKENDS
from trainspec.causal import causal_order
from trainspec.checkpoints import folders
from trainspec.checkpoints.checkpoint import check_readable, read_origin
from trainspec.checkpoints.formats import Formats
from trainspec.checkpoints.resume import check_resumable
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.checkpoints.verify import newest_whole
from trainspec.data import Batch
from trainspec.errors import MachineError, NonFiniteLossError, Note, RecipeError, StoppedError, UserError
from trainspec.evaluation.loss import heldout_examples
from trainspec.files.hf import model_notes
from trainspec.generation.request import Settings
from trainspec.generation.responder import Responder
from trainspec.plans.accelerators import Devices
from trainspec.recipe import idle_settings
from trainspec.runs.agreement import Agreement
from trainspec.runs.clock import AGREE, INPUT, READ, UPDATE, Clock
from trainspec.runs.opening import describe, opening
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run, arithmetic_of
from trainspec.runs.stops import StopRequest, listening
from trainspec.schedule import learning_rate
from trainspec.step import Backend, S
from trainspec.text.store import find_tokenizer
from trainspec.training.observers import (
    CheckpointObserver,
    Due,
    EvaluationObserver,
    Observer,
    ReportObserver,
    SampleObserver,
    StepTime,
    TraceObserver,
    Update,
    needs_of,
    trace_header,
)
from trainspec.training.prefetch import prefetch
from trainspec.training.prepare import check_output
from trainspec.training.report import NullReporter, Reporter
from trainspec.training.request import TrainRequest
from trainspec.training.run_data import RunData, open_data


@dataclass(frozen=True)
class _OpenRun(Generic[S]):
    """A run whose data is open, and what trains it."""

    backend: Backend[S]
    run: Run
    data: RunData
    request: TrainRequest
    processes: Processes
    devices: Devices


def train(
    backend: Backend[S], run: Run, request: TrainRequest, *, processes: Processes, devices: Devices
) -> None:
    """Train to the recipe's last step; writes metrics, checkpoints and, on request, a trace.

    Raises UserError for mistakes in the recipe or its files, NonFiniteLossError for a loss that is not finite, and
    StoppedError where SIGTERM or Ctrl-C asked the run to stop.
    """
    with listening(request.stop) as stop:
        _train(backend, run, request, processes=processes, devices=devices, stop=stop)


def _train(
    backend: Backend[S],
    run: Run,
    request: TrainRequest,
    *,
    processes: Processes,
    devices: Devices,
    stop: StopRequest,
) -> None:
    out, program = request.out, BACKENDS[devices.backend].program
    saved, is_leader = check_output(request), processes.is_leader
    if is_leader:  # before anything that takes long
        lines = opening(run, devices, name=program, out=out)
        print("\n".join([*lines, *model_notes(run.recipe.model, run.spec, run.directory)]), flush=True)
    run, data = open_data(run)
    saved = _whole(out, processes, devices) if saved else None
    lines = _summary(run, data, saved, request.allow)
    request.clock.lap("data opened")
    opened = _OpenRun(backend, run, data, request, processes, devices)
    store = _store(opened)
    agreement = Agreement(
        processes, stop, failure=store.failure, check=store.check, minutes=run.recipe.checkpoint.every_minutes
    )
    state, last = _started(opened, store, saved), data.span.last
    request.clock.lap("starting weights read")
    with (
        Reporter(out, backend=program, steps=last, resumed_at=state.step) if is_leader else NullReporter()
    ) as reporter:
        for line in [*lines, *_resumed(state.step, last, saved)]:
            reporter.say(line)
        observers = _observers(opened, store, reporter, agreement)
        follow(backend, run, data, state, observers, clock=request.clock, agreement=agreement)
        if state.step < last:
            reporter.say(f"wrote {folders.latest(out) or out}")
        if request.timings:
            reporter.timings(request.clock.report())


def follow(
    backend: Backend[S],
    run: Run,
    data: RunData,
    state: S,
    observers: Sequence[Observer[S]],
    *,
    clock: Clock | None = None,
    agreement: Agreement | None = None,
) -> S:
    """Make the run's remaining updates, notifying the observers; the next batch is prepared and fed during an update."""
    recipe, span, clock, agreement = run.recipe, data.span, clock or Clock(), agreement or Agreement()
    steps, examples = range(state.step, span.last), recipe.batch.global_examples

    def fed(step: int, start: S = state) -> Batch:
        return backend.feed(start, data.train.batch(step, examples))

    with (
        _observed(observers, state),
        prefetch(fed, steps, waiting=lambda: agreement.look(state.step)) as batches,
    ):
        try:
            for batch in clock.awaited(batches):
                with clock.during(AGREE):
                    agreement.go_on(state.step)
                lr = learning_rate(
                    recipe.schedule, peak=recipe.optimizer.lr, step=state.step, steps=span.steps
                )
                try:
                    state, update = _update(backend, state, batch, lr, observers, clock)
                except NonFiniteLossError as error:
                    _not_finite(error, state, batch, lr, observers)
                    raise
                for observer in observers:
                    with clock.during(observer.name):
                        update = observer.updated(state, update)
        except StoppedError:
            for observer in observers:
                observer.stopped(state, None)
            raise
    return state


@contextmanager
def _observed(observers: Sequence[Observer[S]], state: S) -> Iterator[None]:
    """Tell the observers of the run's begin and of its end, whatever ends it."""
    with ExitStack() as stack:
        for observer in observers:
            stack.push(lambda kind, error, trace, observer=observer: observer.finished(error))
            observer.started(state)
        yield


def _update(
    backend: Backend[S], state: S, batch: Batch, lr: float, observers: Sequence[Observer[S]], clock: Clock
) -> tuple[S, Update]:
    """One update, with what the observers need of it. Its time is that of `train_step` alone."""
    needs = needs_of(observers, state.step + 1)
    with clock.during(READ):
        before = backend.weights_of(state) if needs.before else {}
    with clock.during(UPDATE):
        state, metrics = backend.train_step(state, batch, lr=lr, keep=needs.keep)
    with clock.during(READ):
        weights, moments = (
            (backend.weights_of(state), backend.moments_of(state)) if needs.after else ({}, ({}, {}))
        )
    time = StepTime(clock.seconds(UPDATE), waited=clock.seconds(INPUT), is_first=clock.is_first)
    return state, Update(state.step, batch, lr, metrics, time, before, weights, moments)


def _not_finite(
    error: NonFiniteLossError, state: S, batch: Batch, lr: float, observers: Sequence[Observer[S]]
) -> None:
    """Tell the observers of a step whose loss or gradient is not finite, before which `state` is as it was."""
    unmade = (
        Update(state.step + 1, batch, lr, error.metrics, StepTime(0.0), {}, {}, ({}, {}))
        if error.metrics
        else None
    )
    for observer in observers:
        try:
            observer.stopped(state, unmade)
        except (OSError, MachineError, UserError) as unsaved:  # the loss is what ends the run
            error.add_note(Note(f"after step {state.step}: {unsaved}"))


def _observers(
    opened: _OpenRun[S],
    store: CheckpointStore[S],
    reporter: Reporter | NullReporter,
    agreement: Agreement,
) -> list[Observer[S]]:
    """The observers of a run, in the order in which they are notified."""
    backend, run, data, trace = opened.backend, opened.run, opened.data, opened.request.trace
    recipe, last, is_leader = run.recipe, data.span.last, opened.processes.is_leader
    observers: list[Observer[S]] = []
    if trace:
        order = causal_order(run.spec, recipe.method)
        header = trace_header(recipe, data.identity, opened.devices)
        observers.append(TraceObserver(backend, trace, order, is_leader=is_leader, header=header))
    if data.heldout:
        due = Due(recipe.run.eval_every_steps, last)
        observers.append(
            EvaluationObserver(
                backend, data.heldout, examples=heldout_examples(run), due=due, agreement=agreement
            )
        )
    if data.questions:
        due = Due(recipe.run.eval_every_steps, last)
        tokenizer = find_tokenizer(recipe.data, run.directory, recipe.model.from_)
        responder = Responder(backend, run, tokenizer, Settings(), data.questions.stops)
        prompts = [question.prompt for question in data.questions.asked]
        observers.append(SampleObserver(responder, prompts, reporter, due=due, agreement=agreement))
    due = Due(recipe.checkpoint.every_steps, last)
    observers.append(CheckpointObserver(store, due=due, agreement=agreement, say=reporter.say))
    return [*observers, ReportObserver(reporter, arithmetic_of(run), last=last)]


def _store(opened: _OpenRun[S]) -> CheckpointStore[S]:
    """The store of the run's checkpoints."""
    run, identity, devices, processes = opened.run, opened.data.identity, opened.devices, opened.processes
    manifest = replace(
        manifest_of(run.recipe, identity, {p.name: p.shape for p in run.trained}),
        backend=devices.backend,
        versions={package: version(package) for package in devices.packages},
    )
    formats = Formats(opened.backend, run, processes, identity=identity)
    return CheckpointStore(opened.request.out, formats, manifest, run.recipe.checkpoint, processes)


def _summary(run: Run, data: RunData, saved: Path | None, allow: Collection[str]) -> list[str]:
    """What the user is told before training. Raises RecipeError where the run cannot resume from `saved`."""
    recipe, span, lines = run.recipe, data.span, [describe(run)]
    lines += [
        data.train.summary,
        span.describe(examples=data.train.num_examples, global_examples=recipe.batch.global_examples),
    ]
    lines += idle_settings(recipe, span)
    if data.questions and (note := data.questions.note()):
        lines.append(note)
    if saved:
        origin = read_origin(saved)
        lines += check_resumable(origin, recipe, data.identity, steps=span.steps, allow=allow)
    return lines


def _whole(out: Path, processes: Processes, devices: Devices) -> Path:
    """The checkpoint to resume from. The user is told at once of those that are set aside: nothing else remembers why.

    Raises RecipeError where none is whole, and for one in another backend's native format.
    """
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if processes.is_leader:
            print(line, flush=True)

    saved = newest_whole(out, processes, say)
    if saved is None:
        raise RecipeError(f"{out}: --resume found no whole checkpoint there: {said[-1]}")
    check_readable(saved, devices.backend)
    return saved


def _resumed(step: int, last: int, saved: Path | None) -> list[str]:
    """What the user is told of a run that starts from a checkpoint."""
    done = "; nothing remains to be done" if step >= last else ""
    return [f"resuming after step {step} of {last}, from {saved}{done}"] if saved else []


def _started(opened: _OpenRun[S], store: CheckpointStore[S], saved: Path | None) -> S:
    """The state from which the run continues: its start, or a checkpoint."""
    run, out = opened.run, opened.request.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise UserError(f"{out}: no directory can be made there; give another --out") from None
    state = opened.backend.init_state(run)
    if saved:
        state = store.load(state, saved)
    if opened.processes.is_leader:
        folders.remove_leftovers(out)
        (out / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    return state
