"""What a run does with saves that fail: all its processes end alike, each failure is told once, and none is waited for in vain."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from writers import State, in_processes, names, store_of

from trainspec.checkpoints import folders
from trainspec.checkpoints.notes import note
from trainspec.errors import MachineError
from trainspec.failures import notes_of
from trainspec.runs.agreement import Agreement
from trainspec.runs.processes import Processes
from trainspec.training import observers
from trainspec.training.observers import CheckpointObserver, Due, StepTime, Update


def update_of(step: int) -> Update:
    metrics: Any = SimpleNamespace()
    return Update(step, metrics, 0.0, metrics, StepTime(0.0), {}, {}, ({}, {}))


def full(*steps: int) -> Any:
    def fail(step: int) -> None:
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device", "weights.safetensors")

    return fail


def saving(out: Path, processes: Processes | None = None, **settings: Any) -> SimpleNamespace:
    """The observer of a run that saves after every update, its store's format, and what it says."""
    store, written = store_of(out, processes, **settings)
    said: list[str] = []
    observer = CheckpointObserver(store, due=Due(1, last=9), agreement=Agreement(processes), say=said.append)
    return SimpleNamespace(observer=observer, store=store, written=written, said=said)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_no_process_goes_on_where_a_save_of_one_has_failed(tmp_path: Path, asynchronous: bool):
    """Process 1 fails after process 2 has written its part, which hears of it from nobody's files."""

    def fail(step: int) -> None:
        while not note(folders.unfinished(tmp_path, step), 2).exists():
            time.sleep(0.005)
        full(1)(step)

    def work(processes: Processes) -> tuple[int, str]:
        run = saving(tmp_path, processes, asynchronous=asynchronous)
        if processes.index == 1:
            run.written.fail = fail
        for step in (1, 2, 3):
            try:
                run.observer.updated(State(step), update_of(step))
            except MachineError as error:
                assert run.said == []
                return step, str(error)
        raise AssertionError("it went on")

    found = in_processes(3, work)
    assert [step for step, _ in found] == [2 if asynchronous else 1] * 3
    assert all("No space left on device: step-000001 was not saved" in line for _, line in found)
    assert found[2][1].startswith("process ")
    assert names(tmp_path) == []


def test_without_a_thread_of_its_own_a_save_is_done_when_the_run_goes_on(tmp_path: Path):
    for asynchronous in (False, True):
        run = saving(tmp_path / str(asynchronous), asynchronous=asynchronous)
        if asynchronous:
            run.written.hold.clear()  # control
        run.observer.updated(State(1), update_of(1))
        done = (tmp_path / f"{asynchronous}/checkpoints/step-000001").exists()
        run.written.hold.set()
        run.store.wait()
        assert done != asynchronous


@pytest.mark.parametrize("is_stopped", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_that_is_forgiven_is_said_and_the_last_one_ends_the_run(
    tmp_path: Path, count: int, is_stopped: bool
):
    def work(processes: Processes) -> tuple[list[str], list[str]]:
        run, ends = saving(tmp_path, processes, on_failure="continue"), []
        if processes.is_leader:
            run.written.fail = full(1, 3)
        for step in (1, 2, 3):
            run.observer.updated(State(step), update_of(step))
        for _ in range(2):  # the second time it has been raised
            try:
                if is_stopped:
                    run.observer.stopped(State(3), None)
                run.observer.finished(None)
            except MachineError as error:
                ends.append(str(error))
        return run.said, ends

    said, ends = in_processes(count, work)[0]
    assert len(said) == len(ends) == 1
    assert "step-000001 was not saved" in said[0]
    assert "step-000003 was not saved" in ends[0]
    assert "step-000002" in names(tmp_path)


def test_older_ones_that_cannot_be_removed_are_said_and_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuses(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "latest")

    monkeypatch.setattr("trainspec.checkpoints.retention.apply", refuses)
    run = saving(tmp_path, on_failure="continue")
    run.observer.updated(State(1), update_of(1))
    run.observer.finished(None)
    assert run.said == ["latest: Input/output error; step-000001 is saved, but older ones were not removed"]


def test_a_run_of_several_that_ends_with_an_error_does_not_wait_for_a_save_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainspec.checkpoints.store._GIVING_UP_SECONDS", 0.05)
    monkeypatch.setattr(observers, "_PEERS_SECONDS", 0.05)
    run, error = saving(tmp_path, Processes(0, 2)), RuntimeError("connection reset")
    run.written.hold.clear()
    run.observer.updated(State(1), update_of(1))
    run.observer.finished(error)
    assert notes_of(error) == [
        "a checkpoint was not finished: step-000001 was not saved: it waits for other processes, which may be gone"
    ]
    # A process that is alone waits as long as it takes.
    alone, error = saving(tmp_path / "alone"), RuntimeError("out of memory")
    alone.observer.updated(State(1), update_of(1))
    alone.observer.finished(error)
    assert notes_of(error) == []
    assert names(tmp_path / "alone") == ["latest", "step-000001"]
    run.written.hold.set()
    run.store._given_up.set()
