"""The store: one save at a time beside the run, what an error means, what is kept, and what `latest` and `best` stand for."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from writers import SHAPES, State, holds, in_processes, names, recipe_of, save, store_of

from trainspec.checkpoints import folders, portable, retention
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.manifest import read_manifest
from trainspec.checkpoints.portable import write_shards
from trainspec.checkpoints.shards import KINDS, Shard, as_shards
from trainspec.checkpoints.store import CheckpointStore, manifest_of
from trainspec.errors import MachineError, WeightsError
from trainspec.runs.processes import Processes


def full(step: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "weights.safetensors")


def test_the_run_goes_on_while_one_save_is_in_flight(tmp_path: Path):
    store, written = store_of(tmp_path)
    written.hold.clear()
    store.save(State(1))
    assert folders.latest(tmp_path) is None
    store.check()
    assert (store.failure(), store.forgiven()) == (None, [])
    waiting = threading.Thread(target=lambda: store.save(State(2)))
    waiting.start()
    assert names(tmp_path) == [".step-000001.tmp"]  # the second waits for the first
    written.hold.set()
    waiting.join()
    store.save(State(2))  # the same once more is not saved again
    store.wait()
    store.wait()
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]
    assert store.forgiven() == []
    assert all(holds(tmp_path / f"checkpoints/step-00000{step}", State(step)) for step in (1, 2))


class InPlace:
    """Arrays that every update writes over, as both backends do: each state into the memory of the one before."""

    def __init__(self) -> None:
        self.arrays = {kind: State(0).arrays(kind) for kind in KINDS}

    def updated(self, step: int) -> State:
        for kind, arrays in self.arrays.items():
            for name, array in State(step).arrays(kind).items():
                arrays[name][...] = array
        return State(step)

    def shards_of(self, state: State, copy: Copy) -> Iterator[Shard]:
        for kind, arrays in self.arrays.items():
            yield from as_shards(kind, {name: copy(array) for name, array in arrays.items()})

    def copied_bytes(self, state: State) -> list[int]:
        return [array.nbytes for arrays in self.arrays.values() for array in arrays.values()]


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "control: does not wait"])
def test_a_save_in_flight_has_its_own_state_when_the_next_is_copied(
    waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second copy is taken into the memory of the first, whose writer is held until the store waits for it."""
    recipe, backend = recipe_of(), InPlace()
    may_write = {"1": threading.Event(), "2": threading.Event()}

    def write(*arguments: Any, metadata: dict[str, str]) -> dict[str, str]:
        assert may_write[metadata["step"]].wait(60)
        return write_shards(*arguments, metadata=metadata)

    monkeypatch.setattr(portable, "write_shards", write)
    array_format = portable.PortableFormat(
        cast(Any, backend), cast(Any, SimpleNamespace(recipe=recipe)), Processes()
    )
    store = CheckpointStore(
        tmp_path, array_format, manifest_of(recipe, None, SHAPES), recipe.checkpoint, Processes()
    )
    store.prepare(backend.updated(0))
    store.save(backend.updated(1))
    first, wait = store._save, store.wait
    assert first is not None
    backend.updated(9)  # the copy is the save's own
    monkeypatch.setattr(store, "wait", lambda: (may_write["1"].set(), wait()) if waits else None)
    store.save(backend.updated(2))
    may_write["1"].set()
    first.join()
    may_write["2"].set()
    wait()
    found = [holds(tmp_path / f"checkpoints/step-00000{step}", State(step)) for step in (1, 2)]
    assert found == [waits, True]


def test_an_error_of_the_writer_stops_the_run_at_the_next_step(tmp_path: Path):
    save(tmp_path, 1)
    store, written = store_of(tmp_path)
    written.fail = full
    store.save(State(2))
    store._save.join()  # type: ignore[union-attr]
    told = (
        "weights.safetensors: No space left on device: step-000002 was not saved; the newest checkpoint is step-000001; "
        "make room there, such as by removing an older checkpoint, or give another --out"
    )
    assert store.failure() == told
    assert store.forgiven() == []
    with pytest.raises(MachineError) as caught:
        store.check()
    assert str(caught.value) == told
    assert (store.failure(), store.forgiven()) == (None, [])
    store.wait(is_last=True)  # raised once
    assert names(tmp_path) == ["latest", "step-000001"]
    assert holds(tmp_path / "checkpoints/step-000001", State(1))


def test_or_is_reported_where_the_recipe_says_so(tmp_path: Path):
    store, written = store_of(tmp_path, on_failure="continue")
    written.fail = lambda step: full(step) if step == 2 else None
    for step in (1, 2, 3):
        store.save(State(step))
        assert store.failure() is None
    store.wait(is_last=True)
    (line,) = store.forgiven()
    assert "No space left on device: step-000002 was not saved" in line
    assert names(tmp_path) == ["latest", "step-000001", "step-000003"]
    written.fail = lambda step: (_ for _ in ()).throw(WeightsError("a is not finite"))
    store.save(State(4))
    with pytest.raises(WeightsError, match="not finite"):  # that is no failure of a machine
        store.wait()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_an_error_of_one_process_is_every_ones(tmp_path: Path, count: int, on_failure: str):
    save(tmp_path, 1, count=count)

    def work(processes: Processes) -> tuple[bool, list[Any]]:
        store, written = store_of(tmp_path, processes, on_failure=on_failure)
        if processes.index == count - 1:
            written.fail = lambda step: full(step) if step == 2 else None
        store.save(State(2))
        store._save.join()  # type: ignore[union-attr]
        words = processes.exchange(store.failure() or "")
        if any(words):
            with pytest.raises(MachineError, match="No space left") if store.failure() else _nothing():
                store.check()
            return True, store.forgiven()
        store.save(State(3))
        store.wait()
        return False, store.forgiven()

    found = in_processes(count, work)
    assert [stopped for stopped, _ in found] == [on_failure == "stop"] * count
    if on_failure == "continue":
        assert f"process {count - 1} of {count}: weights.safetensors: No space left" in found[0][1][0]
    kept = ["latest", "step-000001"] if on_failure == "stop" else ["latest", "step-000001", "step-000003"]
    assert names(tmp_path) == kept
    assert all(holds(tmp_path / "checkpoints" / name, State(int(name[-1]))) for name in kept[1:])


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_the_leader_gives_up_waiting_for_a_process_that_is_gone(tmp_path: Path):
    save(tmp_path, 1, count=2)
    store, _ = store_of(tmp_path, Processes(0, 2))
    store.save(State(2))
    assert not store._save.is_done  # type: ignore[union-attr]
    with pytest.raises(
        MachineError, match="process 1 of 2 has not written its files; all processes need the same --out"
    ):
        store.wait(0.05)
    assert names(tmp_path) == ["latest", "step-000001"]


def test_a_format_that_waits_for_a_process_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As orbax does, at a barrier of its own: nothing but the end of the process ends that."""
    monkeypatch.setattr("trainspec.checkpoints.store._GIVING_UP_SECONDS", 0.05)
    store, written = store_of(tmp_path)
    written.hold.clear()
    store.save(State(2))
    with pytest.raises(MachineError, match=r"^step-000002 was not saved: it waits for other processes"):
        store.wait(0.05)
    written.hold.set()
    store.wait()
    # And where it has a limit of its own, that is no error of the disk.
    written.fail = lambda step: (_ for _ in ()).throw(TimeoutError("Timed out after 5 seconds."))
    store.save(State(3))
    with pytest.raises(
        MachineError, match=r"^Timed out .*: step-000003 was not saved; .*; another process may"
    ):
        store.wait()


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_where_one_process_cannot_make_the_directory_none_begins(
    tmp_path: Path, on_failure: str, monkeypatch: pytest.MonkeyPatch
):
    here, make = threading.local(), Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if getattr(here, "fails", False):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)

    def work(processes: Processes) -> tuple[list[int], str]:
        store, written = store_of(tmp_path, processes, on_failure=on_failure)
        begun, begin = [], written.begin
        written.begin = lambda folder, state: begun.append(state.step) or begin(folder, state)
        here.fails = processes.index == 1
        store.save(State(1))
        store._save.join()  # type: ignore[union-attr]
        here.fails, failure = False, store.failure()
        processes.exchange("")
        if failure is None:
            failure = store.forgiven()[0]
            store.save(State(2))
            store.wait()
        return begun, failure

    found = in_processes(3, work)
    saved = [2] if on_failure == "continue" else []
    assert [begun for begun, _ in found] == [saved] * 3
    assert all(
        "Disk quota exceeded: step-000001 was not saved; there is no earlier one" in f for _, f in found
    )
    assert [f.startswith("process 1 of 3: ") for _, f in found] == [True, False, True]
    assert [path.name for path in folders.complete(tmp_path)] == [f"step-00000{step}" for step in saved]


@pytest.mark.parametrize("count", [2, 4])
def test_what_some_processes_write_is_one_checkpoint(tmp_path: Path, count: int):
    save(tmp_path, 1, 2, 3, count=count)
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"]
    newest = tmp_path / "checkpoints/latest"
    assert holds(newest, State(3))
    manifest = read_manifest(newest)
    assert len(manifest.digests) == 3 * count
    assert manifest.shapes == SHAPES
    assert {name: (newest / name).stat().st_size for name in manifest.digests} == manifest.sizes


def test_a_part_that_no_process_has_is_missed(tmp_path: Path):
    """Both say that they are process 0 of 1: half of every tensor."""
    store, written = store_of(tmp_path)
    written._processes = Processes(0, 2)
    store.save(State(1))
    with pytest.raises(WeightsError, match="no file has all of a; no checkpoint was written"):
        store.wait()
    assert names(tmp_path) == []


LOSSES = {1: 5.0, 2: 3.0, 3: None, 4: 2.0, 5: 2.5, 6: 2.0, 7: None, 8: 9.0}


@pytest.mark.parametrize(
    ("settings", "kept", "best"),
    [
        ({"keep": 2}, [7, 8], None),
        ({"keep": 9}, [1, 2, 3, 4, 5, 6, 7, 8], None),
        ({"keep": 1, "keep_best": 1}, [6, 8], 6),
        ({"keep": 1, "keep_best": 3}, [4, 5, 6, 8], 6),
        ({"keep": 1, "keep_every_steps": 3}, [3, 6, 8], None),
        ({"keep": 2, "keep_every_steps": 4, "keep_best": 1}, [4, 6, 7, 8], 6),
    ],
)
def test_what_is_kept(tmp_path: Path, settings: dict[str, Any], kept: list[int], best: int | None):
    store, _ = store_of(tmp_path, **settings)
    for step, loss in LOSSES.items():
        store.save(State(step), heldout_loss=loss)
    store.wait()
    beside = ["best", "latest"] if best else ["latest"]
    assert names(tmp_path) == [*beside, *(f"step-{step:06d}" for step in kept)]
    home = tmp_path / "checkpoints"
    assert os.readlink(home / "latest") == "step-000008"
    assert best is None or os.readlink(home / "best") == f"step-{best:06d}"
    assert folders.latest(tmp_path) == home / "step-000008"
    assert [folders.step_of(path) for path in folders.complete(tmp_path)] == kept
    # With other settings the names follow at the next save.
    store, _ = store_of(tmp_path, keep=1)
    store.save(State(9))
    store.wait()
    assert names(tmp_path) == ["latest", "step-000009"]


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path):
    store, _ = store_of(tmp_path, keep=3, keep_best=1)
    for step in (1, 2, 3):
        store.save(State(step), heldout_loss=float(step))
    store.wait()
    paths = folders.complete(tmp_path)
    assert retention.best_of(paths) == paths
    (paths[0] / "checkpoint.json").write_text("{")
    assert retention.best_of(paths) == paths[1:]


def test_without_symbolic_links_the_names_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "symlink_to", refused)
    save(tmp_path, 2)
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000002\n"
    assert [path.name for path in folders.complete(tmp_path)] == ["step-000001", "step-000002"]
    monkeypatch.undo()
    save(tmp_path, 3)
    assert os.readlink(tmp_path / "checkpoints/latest") == "step-000003"


def test_a_name_that_was_copied_as_a_directory_is_a_name_again(tmp_path: Path):
    save(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows the link
    assert not (tmp_path / "copy/checkpoints/latest").is_symlink()
    assert folders.latest(tmp_path / "copy") == tmp_path / "copy/checkpoints/step-000001"
    save(tmp_path / "copy", 2)
    assert os.readlink(tmp_path / "copy/checkpoints/latest") == "step-000002"
    assert holds(tmp_path / "copy/checkpoints/step-000001", State(1))


def test_a_file_system_without_rename_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)

    def refused(self: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", refused)
    store, _ = store_of(tmp_path)
    store.save(State(2))
    with pytest.raises(
        MachineError,
        match=r"process-00000\.json: Operation not supported: step-000002 was not saved; .*cannot do this; give an",
    ):
        store.wait()
    assert names(tmp_path) == ["latest", "step-000001"]
    assert holds(tmp_path / "checkpoints/step-000001", State(1))
