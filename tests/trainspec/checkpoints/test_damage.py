"""Every damage of every file is named before anything is loaded, and the checkpoint before it is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from writers import State, holds, in_processes, save, store_of

from trainspec.checkpoints import folders, store, verify
from trainspec.checkpoints.checkpoint import load
from trainspec.checkpoints.manifest import FILE, DamagedError, read_manifest
from trainspec.checkpoints.newest import newest_state
from trainspec.errors import MachineError, RecipeError, UserError, WeightsError
from trainspec.plans.accelerators import Devices
from trainspec.runs.processes import Processes
from trainspec.training import loop
from trainspec.training.prepare import check_output
from trainspec.training.request import TrainRequest

# Of each file so many bits are flipped, at random places, one at a time; and it is cut at so many.
FLIPS, CUTS = 60, 5
Damage = Callable[[Path, "Runs", np.random.Generator], str]


class Runs:
    """A run of two processes with the steps 1 to 3, and another of another seed."""

    def __init__(self, home: Path) -> None:
        self.mine, self.other = home / "mine", home / "other"
        save(self.mine, 1, 2, 3, count=2, keep=3)
        save(self.other, 3, count=2, seed=7)

    @property
    def newest(self) -> Path:
        return self.mine / "checkpoints/step-000003"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def damaged(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(runs.mine, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


FILES = (
    FILE,
    *(f"{kind}-0000{i}-of-00002.safetensors" for kind in ("weights", "moment1", "moment2") for i in range(2)),
)


def test_a_whole_checkpoint_is_whole(runs: Runs):
    assert sorted(path.name for path in runs.newest.iterdir()) == sorted(FILES)
    assert verify.damages(runs.newest) == []
    verify.verify(runs.newest)
    assert all(holds(runs.mine / f"checkpoints/step-00000{step}", State(step)) for step in (1, 2, 3))
    assert not holds(runs.newest, State(2))  # control
    assert verify.newest_whole(runs.mine, Processes()) == runs.newest


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_every_flip_cut_and_loss_is_named(damaged: Path, name: str):
    newest = damaged / "checkpoints/step-000003"
    file, content = newest / name, (newest / name).read_bytes()
    rng = np.random.default_rng(FILES.index(name))
    for bit in rng.integers(0, 8 * len(content), FLIPS):
        file.write_bytes(flipped(content, int(bit)))
        (line,) = verify.damages(newest)
        assert name in line, bit
        assert "damaged" in line, bit
    for size in [0, len(content) - 1, *(int(s) for s in rng.integers(1, len(content), CUTS))]:
        file.write_bytes(content[:size])
        (line,) = verify.damages(newest)
        assert name in line, size
        assert name == FILE or f"{size or 'empty'}" in line, size
    file.write_bytes(content + b"x")
    assert name in verify.damages(newest)[0]
    file.unlink()
    (line,) = verify.damages(newest)
    assert name in line
    assert "missing" in line
    file.write_bytes(content)
    assert verify.damages(newest) == []  # control


@pytest.mark.parametrize("name", [name for name in FILES if name != FILE])
def test_a_file_of_another_run_step_or_place_is_named_as_such(runs: Runs, damaged: Path, name: str):
    newest = damaged / "checkpoints/step-000003"
    content = (newest / name).read_bytes()
    other = {"moment1": "moment2", "moment2": "weights", "weights": "moment1"}[name.partition("-")[0]]
    swaps = {
        "it is of another run": runs.other / "checkpoints/step-000003" / name,
        "it is of step 2": runs.mine / "checkpoints/step-000002" / name,
        f"it is {other}": newest / name.replace(name.partition("-")[0], other),
    }
    for words, source in swaps.items():
        shutil.copyfile(source, newest / name)
        (line,) = verify.damages(newest)
        assert name in line
        assert words in line
        (newest / name).write_bytes(content)
    assert verify.damages(newest) == []


def test_a_manifest_of_another_step_or_run_is_named(runs: Runs, damaged: Path):
    newest = damaged / "checkpoints/step-000003"
    shutil.copyfile(runs.mine / "checkpoints/step-000002" / FILE, newest / FILE)
    assert verify.damages(newest) == [f"{newest / FILE}: is that of step 2"]
    shutil.copyfile(runs.other / "checkpoints/step-000003" / FILE, newest / FILE)
    lines = verify.damages(newest)
    assert len(lines) == len(FILES) - 1
    assert all("it is of another run" in line for line in lines)
    with pytest.raises(WeightsError, match=r"it is of another run\) and 5 more; rename or remove"):
        verify.verify(newest)


def test_nothing_is_loaded_from_what_is_damaged(damaged: Path, monkeypatch: pytest.MonkeyPatch):
    newest = damaged / "checkpoints/step-000003"
    file = newest / FILES[1]
    file.write_bytes(flipped(file.read_bytes(), 8 * file.stat().st_size - 3))
    monkeypatch.setattr("trainspec.checkpoints.checkpoint.check_loadable", lambda *_: pytest.fail("loaded"))
    with pytest.raises(WeightsError, match=r"weights-00000-of-00002\.safetensors: damaged"):
        load(newest, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_newest_whole_one_is_used_and_the_damaged_are_set_aside(damaged: Path, count: int):
    """Each process reads every second file, say; what one of them finds decides for all."""
    for step, name in ((3, FILES[2]), (2, FILES[5])):
        file = damaged / f"checkpoints/step-00000{step}" / name
        file.write_bytes(flipped(file.read_bytes(), 8 * file.stat().st_size - 3))
    (damaged / "checkpoints/step-000003.damaged").mkdir()
    found = in_processes(count, lambda processes: told_of(damaged, processes))
    assert found == [found[0]] * count
    path, (first, second) = found[0]
    assert path == damaged / "checkpoints/step-000001"
    assert f"step-000003/{FILES[2]}: damaged" in first
    assert first.endswith("set aside as step-000003.damaged-2")
    assert second.endswith("set aside as step-000002.damaged")
    assert folders.complete(damaged) == [path]
    assert os.readlink(damaged / "checkpoints/latest") == "step-000001"
    (damaged / "checkpoints/step-000001" / FILE).unlink()
    found = in_processes(count, lambda processes: told_of(damaged, processes))
    assert [path for path, _ in found] == [None] * count
    assert "checkpoint.json is missing" in found[0][1][0]
    assert not os.path.lexists(damaged / "checkpoints/latest")


@pytest.mark.parametrize(("losses", "best"), [((1.0, 3.0, 2.0), 1), ((3.0, 2.0, 1.0), 2)])
def test_the_names_beside_a_checkpoint_that_is_set_aside_stand_for_others(
    tmp_path: Path, losses: tuple[float, ...], best: int
):
    store, _ = store_of(tmp_path, keep=3, keep_best=1)
    for step, loss in enumerate(losses, start=1):
        store.save(State(step), heldout_loss=loss)
    store.wait()
    home = tmp_path / "checkpoints"
    assert os.readlink(home / "latest") == "step-000003"
    assert os.readlink(home / "best") == f"step-{1 + losses.index(1.0):06d}"
    (home / "step-000003" / FILE).write_text("{}")
    assert verify.newest_whole(tmp_path, Processes()) == home / "step-000002"
    assert os.readlink(home / "latest") == "step-000002"
    assert os.readlink(home / "best") == f"step-{best:06d}"


def test_a_checkpoint_that_a_kill_left_without_its_name_is_the_newest(damaged: Path):
    """Killed between the two renames of a commit: it was to be replaced, and nothing has taken its place."""
    home = damaged / "checkpoints"
    (home / "step-000003").rename(home / ".step-000003.old")
    shutil.copytree(home / "step-000002", home / ".step-000002.old")
    request = TrainRequest(damaged, resume=True)
    assert check_output(request) == home / "step-000003"
    assert verify.newest_whole(damaged, Processes()) == home / "step-000003"
    assert not (home / ".step-000002.old").exists()  # that one has been replaced


def test_a_foreign_native_checkpoint_before_a_damaged_one_is_refused(
    damaged: Path, capsys: pytest.CaptureFixture[str]
):
    home, devices = damaged / "checkpoints", Devices("torch", "cpu", 1, 1, 1, ())
    (home / "step-000003" / FILE).write_text("{}")
    manifest = read_manifest(home / "step-000002")
    replace(manifest, format="native", backend="jax").write(home / "step-000002")
    with pytest.raises(
        RecipeError, match="step-000002: is in the native format of jax, which torch does not"
    ):
        loop._whole(damaged, Processes(), devices)
    assert capsys.readouterr().out.endswith("not used, and set aside as step-000003.damaged\n")
    assert loop._whole(damaged, Processes(), replace(devices, backend="jax")) == home / "step-000002"


def told_of(out: Path, processes: Processes) -> tuple[Path | None, list[str]]:
    """What is chosen, and what is said of those that are not."""
    said: list[str] = []
    return verify.newest_whole(out, processes, said.append), said


def test_processes_that_verify_together_learn_of_all_damage(damaged: Path):
    newest = damaged / "checkpoints/step-000003"
    in_processes(2, lambda processes: verify.verify_together(newest, processes))  # control
    (newest / FILES[1]).unlink()

    def work(processes: Processes) -> str:
        with pytest.raises(DamagedError, match="missing") as caught:
            verify.verify_together(newest, processes)
        return str(caught.value)

    assert len(set(in_processes(2, work))) == 1
    assert newest.is_dir()  # nothing was set aside


def test_a_digest_that_one_process_cannot_make_is_refused_by_all(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Path, *, share: tuple[int, int]) -> list[str]:
        if share[0] == 1:
            raise RecipeError(f"{path}: BLAKE3 is not installed")
        return []

    monkeypatch.setattr(verify, "damages", refused)

    def work(processes: Processes) -> str:
        with pytest.raises(RecipeError, match=r"^process 1 of 2: .*: BLAKE3 is not installed") as caught:
            verify.newest_whole(damaged, processes)
        return str(caught.value)

    assert len(set(in_processes(2, work))) == 1
    assert folders.latest(damaged) == damaged / "checkpoints/step-000003"  # nothing was set aside


def test_what_cannot_be_read_or_renamed_stops_all(damaged: Path, monkeypatch: pytest.MonkeyPatch):
    def unreadable(path: Path, *, share: tuple[int, int]) -> list[str]:
        if share[0] == 1:
            raise OSError(5, "Input/output error", str(path))
        return []

    with monkeypatch.context() as patch:
        patch.setattr(verify, "damages", unreadable)

        def work(processes: Processes) -> str:
            with pytest.raises(
                MachineError, match=r"process 1 of 2 cannot read a checkpoint: .*Input/output error"
            ) as caught:
                verify.newest_whole(damaged, processes)
            return str(caught.value)

        assert len(set(in_processes(2, work))) == 1
    assert folders.latest(damaged) == damaged / "checkpoints/step-000003"  # nothing was set aside
    for step in (2, 3):
        (damaged / f"checkpoints/step-00000{step}" / FILES[1]).unlink()
    renamed = folders.set_aside

    def fixed(path: Path) -> Path:
        if path.name == "step-000002":
            raise OSError(30, "Read-only file system", str(path))
        return renamed(path)

    monkeypatch.setattr(folders, "set_aside", fixed)
    # The next checkpoint might be step 1's: of the two retention would keep the damaged one, which has the higher number.
    said: list[list[str]] = [[], []]

    def work(processes: Processes) -> str:
        with pytest.raises(MachineError) as caught:
            verify.newest_whole(damaged, processes, said[processes.index].append)
        return str(caught.value)

    first, second = in_processes(2, work)
    assert first == second
    assert "it cannot be set aside (Read-only file system): make " in first
    assert [len(lines) for lines in said] == [1, 1]
    assert said[0][0].endswith("not used, and set aside as step-000003.damaged")  # told before the error


def test_a_file_is_read_once_unless_it_changes(damaged: Path, monkeypatch: pytest.MonkeyPatch):
    newest, read = damaged / "checkpoints/step-000003", []
    damage = verify._damage
    monkeypatch.setattr(
        verify, "_damage", lambda path, name, manifest: read.append(name) or damage(path, name, manifest)
    )
    found = in_processes(2, lambda processes: verify.newest_whole(damaged, processes))
    assert found == [newest] * 2
    assert sorted(read) == sorted(name for name in FILES if name != FILE)  # each by one of the two
    verify.verify(newest)
    assert len(read) == len(FILES) - 1
    file = newest / FILES[1]
    file.write_bytes(file.read_bytes())
    verify.verify(newest)
    assert len(read) == 2 * (len(FILES) - 1)


def test_a_manifest_of_an_earlier_version_has_no_digest(damaged: Path):
    path = damaged / "checkpoints/step-000003" / FILE
    tree = json.loads(path.read_text())
    for key in ("digest", "sizes"):
        del tree[key]
    path.write_text(json.dumps(tree))
    assert read_manifest(path.parent).sizes == {}
    assert verify.damages(path.parent) == []
    path.write_text(json.dumps(tree | {"sizes": {}}))
    with pytest.raises(WeightsError, match=r"checkpoint\.json is damaged"):
        read_manifest(path.parent)


def without(path: Path, name: str) -> None:
    """Leave a file out, and its digest with it."""
    manifest = read_manifest(path)
    digests, sizes = ({k: v for k, v in of.items() if k != name} for of in (manifest.digests, manifest.sizes))
    (path / name).unlink()
    replace(manifest, digests=digests, sizes=sizes).write(path)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_no_file_has_is_damage_to_a_save_a_resume_and_the_command(
    runs: Runs, damaged: Path, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Every file is the one that was written, and still something is not there."""
    newest, before = (damaged / f"checkpoints/step-00000{step}" for step in (3, 2))
    without(newest, "moment1-00001-of-00002.safetensors")
    wrong = f"{newest}: incomplete checkpoint: no file has all of a"
    assert verify.damages(newest) == [wrong]
    with pytest.raises(WeightsError) as caught:
        verify.verify(newest)
    assert str(caught.value) == f"{wrong}; rename or remove {newest} to use the one before it"
    found = in_processes(count, lambda processes: verify.newest_whole(damaged, processes))
    assert found == [found[0]] * count
    assert folders.latest(damaged) == before
    assert newest.with_name("step-000003.damaged").is_dir()
    for name in FILES[3:5]:
        without(before, name)
    assert verify.damages(before) == [f"{before}: incomplete checkpoint: no file of moment1"]
    # A save judges what it has written by the same function.
    monkeypatch.setattr(store, "wrong_shards", lambda folder, _: iter([f"{folder}: planted"]))
    with pytest.raises(WeightsError, match=r"\.step-000004\.tmp: planted; no checkpoint was written"):
        save(damaged, 4)
    assert folders.latest(damaged) == before
    assert verify.damages(runs.newest) == []  # control


def test_a_damaged_manifest_says_the_same_to_all(damaged: Path):
    newest = damaged / "checkpoints/step-000003"
    (newest / FILE).write_text("{}")
    (line,) = verify.damages(newest)
    assert line == f"{newest}: incomplete checkpoint (checkpoint.json is damaged: it has no step)"
    for ask in (read_manifest, verify.verify):
        with pytest.raises(WeightsError) as caught:
            ask(newest)
        assert str(caught.value) == f"{line}; rename or remove {newest} to use the one before it"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "it is not text"),
        (b'{"step": 3,\n oops', "it is not JSON (line 2)"),
        (b"", "it is not JSON (line 1)"),
        (b'{"step": 3}', "it has no recipe"),
        (b'{"step": []}', "a value in it is of another kind"),
        (b"[1]", "a value in it is of another kind"),
    ],
)
def test_a_damaged_manifest_is_described_in_words(damaged: Path, content: bytes, words: str):
    """Not by the names of Python's classes."""
    newest = damaged / "checkpoints/step-000003"
    (newest / FILE).write_bytes(content)
    assert verify.damages(newest) == [
        f"{newest}: incomplete checkpoint (checkpoint.json is damaged: {words})"
    ]


def test_what_is_set_aside_is_told_from_what_was_never_saved(tmp_path: Path):
    """To those that read the newest state and find none: an evaluation, a generation."""

    class Start:
        step = 0

        def init_state(self, run: object) -> Start:
            return self

    def whose(out: Path | None) -> str:
        start: Any = Start()
        return newest_state(start, start, out=out, processes=Processes(), tokenizer_digest="")[1]

    assert whose(None) == "the starting weights"
    way_out = "name the --out of a run that saved one, or give --untrained for the model that the recipe starts from"
    with pytest.raises(UserError, match=f"^no checkpoint under {tmp_path}; {way_out}$"):
        whose(tmp_path)
    with pytest.raises(
        UserError, match=f"^no checkpoint under {tmp_path}/run, which does not exist; {way_out}$"
    ):
        whose(tmp_path / "run")
    save(tmp_path, 1, 2, keep=2)
    for path in folders.complete(tmp_path):
        (path / FILE).write_text("{}")
    (tmp_path / "checkpoints/step-000001.damaged").mkdir()
    (tmp_path / "checkpoints/step-000001.mine").mkdir()  # a user's own
    assert verify.newest_whole(tmp_path, Processes()) is None
    names = "step-000001.damaged, step-000001.damaged-2, step-000002.damaged"
    told = f"no whole checkpoint under {tmp_path}: set aside as damaged: {names}"
    with pytest.raises(UserError, match=f"^{told}; {way_out}$"):
        whose(tmp_path)
