"""The loop with a backend of numpy: who looks on, in which order, what is gathered for them, and what survives an error."""

import json
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainspec.checkpoints import checkpoint, folders, shards, store
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.portable import PortableFormat
from trainspec.errors import NonFiniteLossError, StoppedError
from trainspec.failures import notes_of, outcome
from trainspec.generation.generation import Generation, Prompt
from trainspec.runs.agreement import Agreement
from trainspec.runs.processes import Processes
from trainspec.runs.run import resolve
from trainspec.runs.stops import StopRequest
from trainspec.step import Metrics
from trainspec.trace import Trace, TraceRequest, TraceWriter
from trainspec.trace_header import TraceHeader
from trainspec.training.loop import follow
from trainspec.training.observers import (
    CheckpointObserver,
    Due,
    EvaluationObserver,
    Needs,
    Observer,
    SampleObserver,
    TraceObserver,
    needs_of,
)
from trainspec.training.report import Reporter
from trainspec.training.run_data import open_data


@dataclass(frozen=True)
class State:
    step: int
    weights: dict


class Numpy:
    """A backend whose update adds the step to every weight; it notes every call that may wait for other processes."""

    def __init__(self, shapes):
        self.calls, self.shapes = [], shapes

    def state(self):
        return State(0, {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()})

    def feed(self, state, batch):
        return replace(batch)

    def train_step(self, state, batch, *, lr, keep="nothing"):
        self.calls.append(f"step {keep}")
        weights = {name: w + np.float32(state.step + 1) for name, w in state.weights.items()}
        gradients = weights if keep != "nothing" else None
        return State(state.step + 1, weights), Metrics(float(batch.input_ids.sum()), 7, 1.0, gradients)

    def eval_step(self, state, batch):
        self.calls.append("eval")
        return 2.0 * len(batch.rows), len(batch.rows)

    def weights_of(self, state, *, frozen=False):
        self.calls.append("all weights" if frozen else "weights")
        return dict(state.weights)

    def shards_of(self, state, copy=np.copy):
        self.calls.append("shards")
        return (shard for kind in shards.KINDS for shard in shards.as_shards(kind, state.weights))

    def copied_bytes(self, state):
        return []

    def moments_of(self, state):
        self.calls.append("moments")
        return dict(state.weights), dict(state.weights)


def store_of(prepared, out: Path, processes: Processes | None = None):
    """A run's store of checkpoints."""
    run, data, backend = prepared
    manifest = store.manifest_of(run.recipe, data.identity, backend.shapes)
    processes = processes or Processes()
    portable = PortableFormat(backend, run, processes)
    return store.CheckpointStore(out, portable, manifest, run.recipe.checkpoint, processes)


class Noting(Observer[State]):
    def __init__(self):
        self.seen = []

    def started(self, state):
        self.seen.append(("started", state.step))

    def updated(self, state, update):
        self.seen.append((update.step, update.lr, update.heldout_loss))
        return update

    def stopped(self, state, unmade):
        self.seen.append(("stopped", state.step))

    def finished(self, error):
        self.seen.append("finished" if error is None else type(error).__name__)


@pytest.fixture
def prepared(make_recipe):
    run, data = open_data(resolve(make_recipe(run={"steps": 3}, checkpoint={"every_steps": 2})))
    return run, data, Numpy({p.name: p.shape for p in run.trained})


def test_observers_see_every_update_and_the_end(prepared):
    run, data, backend = prepared
    noting = Noting()
    state = follow(backend, run, data, backend.state(), [noting])
    assert state.step == 3
    assert noting.seen == [("started", 0), (1, 1e-3, None), (2, 1e-3, None), (3, 1e-3, None), "finished"]
    assert backend.calls == ["step nothing"] * 3  # nobody asked for more


def test_each_is_told_what_those_before_it_measured(prepared):
    run, data, backend = prepared
    before, after = Noting(), Noting()
    evaluation = EvaluationObserver(backend, data.train, examples=100, due=Due(2, last=3))
    follow(backend, run, data, backend.state(), [before, evaluation, after])
    assert [seen[2] for seen in before.seen[1:-1]] == [None, None, None]
    assert [seen[2] for seen in after.seen[1:-1]] == [None, 2.0, 2.0]


def test_every_process_makes_the_same_calls_and_the_leader_completes_what_all_write(
    prepared, tmp_path: Path, monkeypatch
):
    """The processes run one after the other here: the leader comes last, and finds the files of the other."""
    run, data, backend = prepared
    calls, shards_of = {}, backend.shards_of
    for index in (1, 0):
        is_leader = index == 0
        mine = {"weights"} if is_leader else {"moment1", "moment2"}
        monkeypatch.setattr(
            backend,
            "shards_of",
            lambda state, copy, mine=mine: [s for s in shards_of(state) if s.kind in mine],
        )
        backend.calls = []
        observers = [
            TraceObserver(backend, TraceRequest(tmp_path / "trace", 2), (), is_leader=is_leader),
            CheckpointObserver(store_of(prepared, tmp_path / "run", Processes(index, 2)), due=Due(2, last=3)),
        ]
        follow(backend, run, data, backend.state(), observers)
        calls[is_leader] = backend.calls
    assert calls[True] == calls[False]
    around = [
        ["weights", f"step {keep}", "weights", "moments"]
        for keep in ("gradients", "activations", "gradients")
    ]
    assert calls[True] == ["all weights", *around[0], *around[1], "shards", *around[2], "shards"]
    trace = Trace(tmp_path / "trace")
    name = run.trained[0].name
    assert trace.header == TraceHeader(first_step=1)
    assert (trace.read(2, f"update/{name}") == 2.0).all()
    assert (trace.read(3, f"moment1/{name}") == 6.0).all()
    newest = folders.latest(tmp_path / "run")
    assert newest == tmp_path / "run/checkpoints/step-000003"
    assert sorted(path.name for path in newest.iterdir()) == [
        "checkpoint.json",
        "moment1-00001-of-00002.safetensors",
        "moment2-00001-of-00002.safetensors",
        "weights-00000-of-00002.safetensors",
    ]
    assert all((w[...] == 6.0).all() for w in checkpoint.load(newest, run).weights.values())


def test_needs_add_up():
    class Asking(Noting):
        def __init__(self, needs):
            self._needs = needs

        def needs(self, step):
            return self._needs if step == 2 else Needs()

    asking = [
        Asking(Needs("gradients")),
        Asking(Needs("activations", before=True)),
        Asking(Needs(after=True)),
    ]
    assert needs_of(asking, 2) == Needs("activations", before=True, after=True)
    assert needs_of(asking, 1) == needs_of([], 2) == Needs()


@pytest.mark.parametrize("broken", [1, 2], ids=["first", "second"])
def test_a_batch_that_cannot_be_made_stops_at_its_step(prepared, monkeypatch, broken: int):
    run, data, backend = prepared
    noting, batch = Noting(), data.train.batch

    def failing(step, examples):
        if step == broken:
            raise ValueError(f"batch {step}")
        return batch(step, examples)

    monkeypatch.setattr(data.train, "batch", failing)
    with pytest.raises(ValueError, match=f"batch {broken}"):
        follow(backend, run, data, backend.state(), [noting])
    assert [seen[0] for seen in noting.seen[:-1]] == ["started", *range(1, broken + 1)]
    assert noting.seen[-1] == "ValueError"


def test_a_resumed_run_reads_on_where_it_stopped(prepared):
    """The position in the data is the step, whatever was made ahead of it."""
    run, data, backend = prepared
    losses = {}

    class Losses(Observer[State]):
        def updated(self, state, update):
            losses.setdefault(update.step, []).append(update.metrics.loss_sum)
            return update

    whole = follow(backend, run, data, backend.state(), [Losses()])
    half = follow(backend, run, replace(data, span=replace(data.span, last=1)), backend.state(), [Losses()])
    assert half.step == 1
    resumed = follow(backend, run, data, half, [Losses()])
    assert all(len(found) == 2 and found[0] == found[1] for found in losses.values())
    assert len({found[0] for found in losses.values()}) == 3  # control: other batches give other losses
    assert all(np.array_equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_an_unused_checkpoint_of_arrays_is_what_is_saved(prepared, tmp_path: Path):
    run, data, backend = prepared
    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(5, last=3))
    follow(backend, run, data, backend.state(), [saving])
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    loaded: Checkpoint = checkpoint.load(path, run)
    assert loaded.step == 3
    assert all((weight[...] == 6.0).all() for weight in loaded.weights.values())


class Asks(Observer[State]):
    """Asks the run to stop in a step."""

    def __init__(self, stop: StopRequest, step: int):
        self._stop, self._step = stop, step

    def updated(self, state, update):
        if update.step == self._step:
            self._stop.hear(signal.SIGTERM)
        return update


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_its_last_update_and_goes_on_from_there(
    prepared, tmp_path: Path, step: int
):
    run, data, backend = prepared
    noting, stop = Noting(), StopRequest()
    agreement = Agreement(stop=stop)
    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(2, last=3), agreement=agreement)
    observers = [Asks(stop, step), saving, noting]
    with pytest.raises(StoppedError, match=f"^stopped by SIGTERM after step {step}$"):
        follow(backend, run, data, backend.state(), observers, agreement=agreement)
    assert [seen[0] for seen in noting.seen[:-2]] == ["started", *range(1, step + 1)]
    assert noting.seen[-2:] == [("stopped", step), "StoppedError"]
    # One that is due anyway is saved once.
    assert [path.name for path in folders.complete(tmp_path)] == [f"step-{step:06d}"]
    assert backend.calls.count("shards") == 1
    saved = checkpoint.load(folders.complete(tmp_path)[0], run)
    assert all((weight[...] == step * (step + 1) / 2).all() for weight in saved.weights.values())


def test_a_run_that_is_asked_to_stop_in_its_last_update_is_done(prepared, tmp_path: Path):
    run, data, backend = prepared
    stop = StopRequest()
    agreement = Agreement(stop=stop)
    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(5, last=3), agreement=agreement)
    assert follow(backend, run, data, backend.state(), [Asks(stop, 3), saving], agreement=agreement).step == 3


def test_no_evaluation_is_begun_or_finished_after_a_request_to_stop(prepared, monkeypatch):
    run, data, backend = prepared
    asked_in, batches = 2, len(list(data.train.in_order(8)))
    assert batches > 3
    noting, stop, measure = Noting(), StopRequest(), backend.eval_step

    def eval_step(state, batch):
        if state.step == asked_in and backend.calls[-2:] == ["eval", "eval"]:
            stop.hear(signal.SIGINT)
        return measure(state, batch)

    monkeypatch.setattr(backend, "eval_step", eval_step)
    agreement = Agreement(stop=stop)
    evaluation = EvaluationObserver(backend, data.train, examples=8, due=Due(1, last=3), agreement=agreement)
    with pytest.raises(StoppedError, match="by Ctrl-C after step 2"):
        follow(backend, run, data, backend.state(), [evaluation, noting], agreement=agreement)
    assert backend.calls == ["step nothing", *["eval"] * batches, "step nothing", *["eval"] * 3]
    assert [seen[2] for seen in noting.seen[1:-2]] == [2.0, None]  # the others see the update all the same


def test_a_request_to_stop_is_heard_while_a_batch_is_waited_for(prepared, monkeypatch):
    run, data, backend = prepared
    noting, stop, batch, given_up = Noting(), StopRequest(), data.train.batch, threading.Event()

    def slow(step, examples):
        if step == 1:
            stop.hear(signal.SIGTERM)
            assert given_up.wait(60), "it was waited for"
        return batch(step, examples)

    class Stopping(Noting):
        def stopped(self, state, unmade):
            super().stopped(state, unmade)
            given_up.set()

    noting = Stopping()
    monkeypatch.setattr(data.train, "batch", slow)
    with pytest.raises(StoppedError, match="after step 1"):
        follow(backend, run, data, backend.state(), [noting], agreement=Agreement(stop=stop))
    assert noting.seen[-2:] == [("stopped", 1), "StoppedError"]


def test_a_second_ctrl_c_does_not_wait_for_a_save(prepared, tmp_path: Path):
    run, data, backend = prepared
    store, released = store_of(prepared, tmp_path), threading.Event()
    begin = store._format.begin

    def slow(folder, state):
        write = begin(folder, state)
        return lambda: released.wait(60) and write()

    store._format.begin = slow

    class Interrupted(Observer[State]):
        def updated(self, state, update):
            raise KeyboardInterrupt

    observers = [CheckpointObserver(store, due=Due(1, last=3)), Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        follow(backend, run, data, backend.state(), observers)
    assert not folders.complete(tmp_path)
    released.set()
    store.wait()
    assert len(folders.complete(tmp_path)) == 1  # control: it was still being written


def test_minutes_save_an_update_that_is_not_due_by_its_number(prepared, tmp_path: Path):
    run, data, backend = prepared
    clock = iter([0.0, 0.0, 61.0, 61.0, 62.0])
    agreement = Agreement(minutes=1, now=lambda: next(clock))
    seen: list[float | None] = []

    class Seconds(Observer[State]):
        def updated(self, state, update):
            seen.append(update.checkpoint_seconds)
            return update

    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(9, last=9), agreement=agreement)
    follow(backend, run, data, backend.state(), [saving, Seconds()], agreement=agreement)
    assert [path.name for path in folders.complete(tmp_path)] == ["step-000002"]
    assert [value is not None for value in seen] == [False, True, False]


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_the_state_before_a_step_that_is_not_finite_is_saved(prepared, tmp_path: Path, broken: int):
    run, data, backend = prepared
    sound = backend.train_step

    def train_step(state, batch, **rest):
        if state.step + 1 == broken:
            raise NonFiniteLossError("infinite", Metrics(np.inf, 7, np.inf))
        return sound(state, batch, **rest)

    backend.train_step = train_step
    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(2, last=3))
    with pytest.raises(NonFiniteLossError):
        follow(backend, run, data, backend.state(), [saving])
    # Nothing is saved before the first update; after the second it is saved already.
    names = [path.name for path in folders.complete(tmp_path)]
    assert names == ([f"step-{broken - 1:06d}"] if broken > 1 else [])
    assert backend.calls.count("shards") == len(names)


def test_a_state_that_cannot_be_saved_does_not_hide_the_loss(prepared, tmp_path: Path, monkeypatch):
    run, data, backend = prepared
    sound = backend.train_step

    def train_step(state, batch, **rest):
        if state.step == 1:
            raise NonFiniteLossError("infinite", Metrics(np.inf, 7, np.inf))
        state, metrics = sound(state, batch, **rest)
        return replace(state, weights={name: w / 0 for name, w in state.weights.items()}), metrics

    backend.train_step = train_step
    saving = CheckpointObserver(store_of(prepared, tmp_path), due=Due(2, last=3))
    with pytest.raises(NonFiniteLossError) as raised, np.errstate(divide="ignore"):
        follow(backend, run, data, backend.state(), [saving])
    [note] = notes_of(raised.value)
    assert note.startswith("after step 1: ")
    assert "is not finite; no checkpoint was written" in note
    assert outcome(raised.value)[0] == 1


@pytest.mark.parametrize("is_leader", [True, False])
@pytest.mark.parametrize("broken", [1, 3])
def test_a_step_that_is_not_finite_is_in_the_trace_of_the_run_that_it_ends(
    prepared, tmp_path: Path, broken: int, is_leader: bool
):
    run, data, backend = prepared
    sound, name = backend.train_step, run.trained[0].name

    def train_step(state, batch, *, lr, keep="nothing"):
        after, metrics = sound(state, batch, lr=lr, keep=keep)
        if after.step < broken:
            return after, metrics
        gradients = {name: array / 0 for name, array in metrics.gradients.items()}
        raise NonFiniteLossError("infinite", replace(metrics, grad_norm=np.inf, gradients=gradients))

    backend.train_step = train_step
    noting, request = Noting(), TraceRequest(tmp_path / "trace")
    observers = [TraceObserver(backend, request, (), is_leader=is_leader), noting]
    with pytest.raises(NonFiniteLossError), np.errstate(divide="ignore"):
        follow(backend, run, data, backend.state(), observers)
    assert [seen[0] for seen in noting.seen[:-2]] == ["started", *range(1, broken)]
    assert noting.seen[-2:] == [("stopped", broken - 1), "NonFiniteLossError"]
    assert (tmp_path / "trace").exists() == is_leader
    if is_leader:
        trace = Trace(tmp_path / "trace")
        assert trace.stopped is not None
        assert (len(trace.steps), trace.stopped["step"]) == (broken - 1, broken)
        assert trace.record(broken)["grad_norm"] == np.inf
        assert trace.record(broken)["tokens"] == 7
        assert np.isinf(trace.read(broken, f"gradient/{name}")).all()
        assert {key.partition("/")[0] for key in trace.names(broken)} == {"batch", "gradient"}
        TraceWriter(tmp_path / "trace")  # the next run's trace has none
        assert not (tmp_path / "trace/stopped.safetensors").exists()


class Answers:
    """Takes the place of a responder: a batch for each prompt, until it is asked to stop."""

    def __init__(self, stop: StopRequest | None = None, after: int = 0) -> None:
        self.stop, self.after, self.made = stop, after, 0

    def respond(self, state, prompts, *, is_stopping):
        for prompt in prompts:
            if self.stop is not None and self.made == self.after:
                self.stop.asked = "SIGTERM"
            if is_stopping():
                return
            self.made += 1
            text = f"{prompt.prompt} <{state.step}>"
            yield [Generation(prompt.prompt, prompt.ids, (5,), text, "stop", prompt.reference)]


def sampled(prepared, out: Path, answers: Answers, stop: StopRequest | None = None, start: int = 0):
    """A run that answers two prompts after its updates 2 and 3, and the lines that it leaves."""
    run, data, backend = prepared
    agreement = Agreement(stop=stop)
    prompts = [Prompt("a\u2028b", (1,), "A"), Prompt("c", (1,))]
    with Reporter(out, backend="program", steps=3, resumed_at=start) as reporter:
        observer = SampleObserver(answers, prompts, reporter, due=Due(2, 3), agreement=agreement)
        state = replace(backend.state(), step=start)
        with suppress(StoppedError):
            follow(backend, run, data, state, [observer], agreement=agreement)
    file = out / "samples.jsonl"
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        if file.exists()
        else []
    )


def test_prompts_are_answered_after_due_updates(prepared, tmp_path: Path):
    lines = sampled(prepared, tmp_path, Answers())
    assert [line["step"] for line in lines] == [2, 2, 3, 3]
    assert lines[2] == {"step": 3, "prompt": "a\u2028b", "text": "a\u2028b <3>", "reference": "A"}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [first, last] = events.Tensors("samples/1")
    assert (first.step, last.step) == (2, 3)
    assert "    a\u2028b <3>" in last.tensor_proto.string_val[0].decode()
    # A run that is resumed after update 2 has its lines once.
    assert sampled(prepared, tmp_path, Answers(), start=2) == lines


def test_a_stop_leaves_no_part_of_an_updates_answers(prepared, tmp_path: Path):
    stop = StopRequest()
    answers = Answers(stop, after=3)
    assert [line["step"] for line in sampled(prepared, tmp_path, answers, stop)] == [2, 2]
    assert answers.made == 3  # one of update 3 was made and is not kept
