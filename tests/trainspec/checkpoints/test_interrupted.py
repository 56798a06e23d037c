"""A save that is killed, or that the disk fails, at any of its calls: what was complete stays so, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from writers import State, forked, holds, names, save, store_of

from trainspec.checkpoints import folders, verify
from trainspec.errors import MachineError
from trainspec.files import tensors
from trainspec.runs.processes import Processes

# What asks the file system for something, by Python's audit events; writing and flushing have none.
EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.listdir",
    "os.scandir",
}


def at_call(number: int, act: Callable[[str], None], within: Path) -> list[int]:
    """Have `act` called before this process's call of that number. Returns the count of calls, as it grows."""
    count = [0]

    def call(what: str) -> None:
        count[0] += 1
        if count[0] == number:
            act(what)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        # A directory is removed by names within it.
        if event in EVENTS and (str(within) in str(arguments[0]) or not str(arguments[0]).startswith("/")):
            call(f"{event} {arguments[0]}")

    sys.addaudithook(heard)
    sync, write = os.fsync, tensors._write_part

    def fsync(descriptor: int) -> None:
        call("fsync")
        sync(descriptor)

    def write_part(descriptor: int, part: tensors._Part) -> bytes:
        call("write")
        return write(descriptor, part)

    os.fsync, tensors._write_part = fsync, write_part
    return count


def number_of_calls(out: Path) -> int:
    """How many calls a save makes."""

    def work() -> int:
        count = at_call(0, lambda what: None, out)
        save(out, 3)
        return count[0]

    return forked(work)


def prepared(out: Path) -> Path:
    """A run with two checkpoints, as many as are promised."""
    first = out.parent / "prepared"
    if not first.exists():
        save(first, 1, 2)
    shutil.copytree(first, out, symlinks=True)
    return out


def state_of(out: Path) -> list[int]:
    """The steps of the complete checkpoints, each of which is what it should be."""
    paths = folders.complete(out)
    assert all(
        verify.damages(path) == [] and holds(path, State(folders.step_of(path) or 0)) for path in paths
    )
    return [folders.step_of(path) or 0 for path in paths]


def test_killed_at_any_call_the_newest_complete_one_loads_and_leftovers_go(tmp_path: Path):
    calls = number_of_calls(prepared(tmp_path / "count"))
    assert calls > 30
    seen = set()
    for number in range(1, calls + 1):
        out = prepared(tmp_path / str(number))

        def work(out: Path = out, number: int = number) -> bool:
            at_call(number, lambda what: os._exit(9), out)
            save(out, 3)
            return True

        assert forked(work) is None, number
        steps = state_of(out)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), number
        seen.add((tuple(steps), any(name.startswith(".") for name in names(out))))
        folders.remove_leftovers(out)
        assert not [name for name in names(out) if name.startswith(".")], number
        assert state_of(out) == steps
        save(out, 4)
        assert state_of(out) == [steps[-1], 4]
        assert names(out)[0] == "latest"
        assert os.readlink(out / "checkpoints/latest") == "step-000004"
    # Controls: the kills came before, at and after the commit, and some of them left something.
    assert {steps for steps, _ in seen} == {(1, 2), (1, 2, 3), (2, 3)}
    assert any(left for _, left in seen)


def test_a_checkpoint_that_is_being_replaced_is_never_lost(tmp_path: Path):
    """Step 2 is saved once more: at each call there is the old one or the new one, and after a start one of them."""

    def again(out: Path) -> None:
        store, _ = store_of(out, seed=5)
        store.save(State(2, 5))
        store.wait()

    counted = prepared(tmp_path / "count")

    def count() -> int:
        calls = at_call(0, lambda what: None, counted)
        again(counted)
        return calls[0]

    def rename_at(number: int, out: Path) -> bool:
        at_call(number, lambda what: os._exit(9), out)
        again(out)
        return True

    calls = forked(count)
    found = set()
    for number in range(calls // 2, calls + 1):
        out = prepared(tmp_path / str(number))
        forked(lambda number=number, out=out: rename_at(number, out))
        folders.remove_leftovers(out)
        newest = out / "checkpoints/step-000002"
        assert verify.damages(newest) == []
        found.add("new" if holds(newest, State(2, 5)) else "old")
        assert found <= {"old", "new"}
        assert holds(newest, State(2, 5)) or holds(newest, State(2))
    assert found == {"old", "new"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=["full", "read-only", "failing"])
def test_a_disk_that_fails_at_any_call_leaves_earlier_checkpoints_and_nothing_else(tmp_path: Path, code: int):
    calls = number_of_calls(prepared(tmp_path / "count"))
    found: dict[str, set[bool]] = {}
    for number in range(1, calls + 1, 1 if code == errno.ENOSPC else 5):
        out = prepared(tmp_path / str(number))

        def work(out: Path = out, number: int = number) -> tuple[str, str]:
            met: list[str] = []

            def fail(call: str, met: list[str] = met) -> None:
                met.append(call)
                raise OSError(code, os.strerror(code))

            at_call(number, fail, out)
            try:
                save(out, 3)
            except MachineError as error:
                return met[0], f"MachineError {error}"
            except BaseException as error:
                return met[0], f"{type(error).__name__} {error}"
            return met[0], ""

        what, said = forked(work)
        steps = state_of(out)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), (what, said)
        assert "\n" not in said
        assert not said or said.startswith("MachineError "), (what, said)
        assert not said or os.strerror(code) in said, (what, said)
        assert not said or "step-000003 " in said, (what, said)
        if steps[-1] == 2:
            assert "step-000003 was not saved; the newest checkpoint is step-000002; " in said, what
            assert [name for name in names(out) if name.startswith(".step-000003.tmp")] == [], what
        found.setdefault(what.partition(" ")[0], set()).add(steps[-1] == 3)
    assert {"open", "os.mkdir"} <= found.keys() or code != errno.ENOSPC


def test_a_file_that_may_not_grow_is_named(tmp_path: Path):
    """The system's own limit: a real error of a write, in the midst of it."""
    out = prepared(tmp_path / "out")

    def work() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        try:
            save(out, 3)
        except BaseException as error:
            return str(error)
        return ""

    said = forked(work)
    assert (
        "checkpoints/.step-000003.tmp/weights.safetensors: File too large: step-000003 was not saved" in said
    )
    assert state_of(out) == [1, 2]
    assert names(out) == ["latest", "step-000001", "step-000002"]
    assert json.loads((out / "checkpoints/step-000002/checkpoint.json").read_text())["step"] == 2


def test_forks_write_one_checkpoint(tmp_path: Path):
    """Four processes of the system, which meet in the directory alone."""

    def work(index: int) -> None:
        store, _ = store_of(tmp_path, Processes(index, 4))
        for step in (1, 2, 3):
            store.save(State(step))
        store.wait()

    children = []
    for index in range(4):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(index)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"]
    assert state_of(tmp_path) == [2, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of its own, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a file system; the calls that fail are simulated above")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_and_a_read_only_disk(small_disk: Path):
    """Real ones. The run goes on where the recipe says so, and its next checkpoint is written once there is room."""
    store, _ = store_of(small_disk, on_failure="continue")
    store.save(State(1))
    store.wait()
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(small_disk).free == 0
    store.save(State(2))
    store.wait()
    *_, line = store.forgiven()
    assert (
        "No space left on device: step-000002 was not saved; the newest checkpoint is step-000001; make room"
        in line
    )
    assert names(small_disk) == ["latest", "step-000001"]
    filler.unlink()
    store.save(State(3))
    store.wait()
    assert state_of(small_disk) == [1, 3]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store, _ = store_of(small_disk)
    store.save(State(4))
    with pytest.raises(
        MachineError,
        match=r"\.step-000004\.tmp: Read-only file system: step-000004 was not saved; .*make it writable",
    ):
        store.wait()
    assert state_of(small_disk) == [1, 3]
