"""What ends a run in the middle is one line with what is saved, and where memory was the matter with what helps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from backend import PROGRAM, main
from small import ROOT

from trainspec.data import Dataset


def full_disk() -> None:
    raise OSError(28, "No space left on device", "a/b")


def driver() -> None:
    raise OSError("CUDA driver missing")


def interrupt() -> None:
    raise KeyboardInterrupt


def memory() -> None:
    raise MemoryError("Unable to allocate 3.00 GiB for an array with shape (3,) and data type float32")


def mistake_of_ours() -> None:
    raise KeyError("x")


ENDINGS = {
    full_disk: (3, "a/b: No space left on device; "),
    driver: (3, "CUDA driver missing; "),
    interrupt: (130, "interrupted; "),
    memory: (3, "out of memory: asked for 3.00 GiB, this "),
    mistake_of_ours: (70, "KeyError: 'x'; "),
}


@pytest.mark.parametrize("what", ENDINGS, ids=lambda what: what.__name__)
@pytest.mark.parametrize("at", [1, 3], ids=["before the first checkpoint", "behind it"])
def test_the_line_ends_with_what_is_saved(what, at, make_recipe, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(make_recipe(run={"steps": 6}, checkpoint={"every_steps": 2}).to_yaml())
    whole = Dataset.batch

    def batch(self: Dataset, step: int, *args: object, **kwargs: object) -> object:
        if step == at:
            while at == 3 and not (out / "checkpoints/step-000002").exists():
                time.sleep(0.01)  # an interruption would not wait for it
            what()
        return whole(self, step, *args, **kwargs)

    monkeypatch.setattr(Dataset, "batch", batch)
    code, start = ENDINGS[what]
    assert main(["train", str(file), "--out", str(out)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 or code == 70
    assert lines[-1].startswith(f"{PROGRAM}: {start}")
    saved = {1: "nothing was saved yet", 3: f"saved: {out}/checkpoints/step-000002; continue with --resume"}[
        at
    ]
    assert lines[-1].endswith(f"; {saved}")
    if at == 3:  # and it is true
        monkeypatch.undo()
        assert main(["train", str(file), "--out", str(out), "--resume"]) == 0


def test_a_request_while_the_program_is_loaded_is_the_same_line(make_recipe, tmp_path, monkeypatch, capsys):
    """Wherever it comes: before anything knows what is saved, and where an error's notes are added already."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(make_recipe().to_yaml())
    for place in (f"{PROGRAM}.commands.load_recipe", f"{PROGRAM}.cluster.set_up"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: signal.raise_signal(signal.SIGTERM))
            assert main(["train", str(file), "--out", str(out)]) == 75
        line = f"{PROGRAM}: stopped by SIGTERM before its first update; nothing was saved yet\n"
        assert capsys.readouterr().err == line, place
        assert not out.exists()


SIGNALLED_WITHIN_AN_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins without
class Asking:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Asking())
from {program}.cli import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_request_within_an_import_is_the_same_line(number: str, make_recipe, tmp_path):
    """What is imported in part cannot be imported again, not even to say what has happened."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(make_recipe().to_yaml())
    words = ["train", str(file), "--out", str(out)]
    code = SIGNALLED_WITHIN_AN_IMPORT.format(module="yaml.nodes", number=number, program=PROGRAM, words=words)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    asked = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[number]
    line = f"{PROGRAM}: stopped by {asked} before its first update; nothing was saved yet\n"
    assert (ended.returncode, ended.stderr) == (75, line)


@pytest.mark.parametrize("asked", ["SIGTERM", pytest.param("Ctrl-C", marks=pytest.mark.full)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_by_bit(
    asked, make_recipe, tmp_path, monkeypatch, capsys
):
    """The signal comes while the first update of the second part is made, which for JAX is while it compiles."""
    file, whole, parts = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "parts"
    file.write_text(make_recipe(run={"steps": 4}, checkpoint={"every_steps": 10}).to_yaml())
    assert main(["train", str(file), "--out", str(whole)]) == 0
    number = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}[asked]
    made = Dataset.batch

    def batch(self: Dataset, step: int, *args: object, **kwargs: object) -> object:
        if step == 1:  # made in a thread, ahead, while update 1 is made
            os.kill(os.getpid(), number)
        return made(self, step, *args, **kwargs)

    monkeypatch.setattr(Dataset, "batch", batch)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    assert main(["train", str(file), "--out", str(parts)]) == 75
    assert signal.getsignal(signal.SIGTERM) == before[1]
    signal.signal(signal.SIGINT, before[0])
    monkeypatch.undo()
    [line] = capsys.readouterr().err.splitlines()
    saved = f"saved: {parts}/checkpoints/step-000001; continue with --resume"
    assert line == f"{PROGRAM}: stopped by {asked} after step 1; {saved}"
    assert main(["train", str(file), "--out", str(parts), "--resume"]) == 0
    for path in sorted((whole / "checkpoints/step-000004").glob("*.safetensors")):
        assert path.read_bytes() == (parts / "checkpoints/step-000004" / path.name).read_bytes(), path.name
    told = capsys.readouterr().out
    assert f"wrote {parts}/checkpoints/step-000004" in told
    assert main(["train", str(file), "--out", str(parts), "--resume"]) == 0
    told = capsys.readouterr().out
    assert "nothing remains to be done" in told
    assert "wrote " not in told


@pytest.mark.skipif(sys.platform != "linux", reason="in /proc nobody makes a directory")
def test_an_out_that_cannot_be_there_is_a_mistake(make_recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(run={"steps": 1}).to_yaml())
    assert main(["train", str(file), "--out", "/proc/none"]) == 2
    told = f"{PROGRAM}: /proc/none: no directory can be made there; give another --out\n"
    assert capsys.readouterr().err == told


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(make_recipe, tmp_path, capsys):
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(make_recipe(run={"steps": 4}, checkpoint={"every_steps": 1}).to_yaml())
    assert main(["train", str(file), "--out", str(out)]) == 0
    damaged = out / "checkpoints/step-000004/weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    # Refused for another reason, after the checkpoint has lost its name.
    assert main(["train", str(file), "--out", str(out), "--resume", "--set", "run.seed=9"]) == 2
    told = capsys.readouterr()
    assert f"{damaged}: damaged (" in told.out
    assert "not used, and set aside as step-000004.damaged\n" in told.out
    assert "run.seed" in told.err
    assert main(["train", str(file), "--out", str(out), "--resume"]) == 0
    told = capsys.readouterr().out
    assert f"resuming after step 3 of 4, from {out}/checkpoints/step-000003\n" in told
    for path in (out / "checkpoints").glob("step-00000[34]"):
        (path / "checkpoint.json").write_text("{}")
    assert main(["train", str(file), "--out", str(out), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "--resume found no whole checkpoint there" in told
    assert told.endswith("; nothing that was saved is whole\n")
    assert main(["train", str(file), "--out", str(out), "--resume"]) == 2
    assert "set aside as damaged: step-000003.damaged, step-000004.damaged" in capsys.readouterr().err


def test_a_loss_that_is_no_number_says_what_is_saved(make_recipe, tmp_path, capsys):
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe = make_recipe(
        method={"kind": "full"}, optimizer={"lr": 1e38}, run={"steps": 9}, checkpoint={"every_steps": 100},
        schedule={"kind": "linear", "warmup_steps": 3},
    )  # fmt: skip
    file.write_text(recipe.to_yaml())
    assert main(["train", str(file), "--out", str(out)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    made = len((out / "metrics.jsonl").read_text().splitlines())
    assert line.startswith(f"{PROGRAM}: stopped before the update: step {made + 1}: loss sum ")
    assert line.endswith(f"; saved: {out}/checkpoints/step-{made:06d}; continue with --resume")


# After the first update, so that what is loaded, compiled and cached is not what there was no room for. A batch is made
# ahead, its learning rate when its update comes.
LIMITED = """
import resource, sys
from trainspec.training import loop
from trainspec.data import Dataset
from {program}.cli import main
whole_batch, whole_rate = Dataset.batch, loop.learning_rate
def batch(self, step, rows):
    return whole_batch(self, step, {rows} if step == 1 else rows)
def learning_rate(schedule, *, step, **settings):
    if step == 1:
        {limit}
    return whole_rate(schedule, step=step, **settings)
Dataset.batch, loop.learning_rate = batch, learning_rate
sys.exit(main({argv!r}))
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux for less room")


def limited(limit: str, make_recipe, tmp_path: Path, *, rows: str = "rows") -> tuple[int, str, Path]:
    """A program of its own that saves after each update and meets a limit after the first; what ended it, in one line."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(
        make_recipe(run={"steps": 3}, checkpoint={"every_steps": 1, "asynchronous": False}).to_yaml()
    )
    code = LIMITED.format(
        program=PROGRAM, limit=limit, rows=rows, argv=["train", str(file), "--out", str(out)]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )  # fmt: skip
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.strip(), out


@LINUX
@pytest.mark.full
def test_a_real_lack_of_memory_is_one_line(make_recipe, tmp_path):
    """A batch of 8192 rows where 4 were asked for: its logits alone are 1.6 GiB."""
    limit = (
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))"
    )
    code, line, out = limited(limit, make_recipe, tmp_path, rows="8192")
    assert code == 3
    assert line.startswith(f"{PROGRAM}: out of memory: asked for ")
    assert "this process may have (ulimit -v) " in line
    assert (
        "what helps, in this order: plan.remat=full, batch.accumulation=2 or more, plan.shards=params with plan.fsdp=2 or more, "
        "data.sequence_tokens below 160"
    ) in line
    assert line.endswith(f"; saved: {out}/checkpoints/step-000001; continue with --resume")


@LINUX
def test_a_disk_that_takes_no_more_is_one_line(make_recipe, tmp_path):
    """Files may be of 4 KiB from then on: too little for the weights of the next checkpoint, enough for the metrics."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"
    code, line, out = limited(limit, make_recipe, tmp_path)
    assert code == 3
    weights = out / "checkpoints/.step-000002.tmp/weights.safetensors"
    assert line.startswith(f"{PROGRAM}: {weights}: File too large: step-000002 was not saved; ")
    assert line.endswith(f"; saved: {out}/checkpoints/step-000001; continue with --resume")
    assert not weights.exists()
