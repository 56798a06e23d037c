"""What ended a command is one line and an exit code; a run that was training says what is saved."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from small import ROOT

from trainspec.checkpoints import folders
from trainspec.command import run_command
from trainspec.errors import MachineError, NonFiniteLossError, Note, PlanError, ProcessError, WeightsError
from trainspec.failures import explained, notes_of, outcome, saved_in
from trainspec.plans.accelerators import Devices
from trainspec.runs.run import resolve

CPU = Devices("jax", "cpu", 1, 1, 1, ())


# Stand-ins of the frameworks' classes: they are known by their names.
class JaxRuntimeError(RuntimeError):
    pass


class AcceleratorError(RuntimeError):
    pass


class DistError(RuntimeError):
    pass


class DistBackendError(DistError):
    pass


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50314"
)
NCCL = """NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3356, unhandled system error
Last error:
socketStartConnect: Connect to 10.0.0.1<4711> failed : Software caused connection abort
Exception raised from check at ../torch/csrc/x.cpp:1 (most recent call first):
frame #0: c10::Error::Error"""
CUDA = """CUDA error: uncorrectable ECC error encountered
CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""
OUTCOMES = {
    "file": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 3, "a/b: No space left on device"),
    "no file": (OSError(errno.EIO, "Input/output error"), 3, "Input/output error"),
    "two files": (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), 3, "a -> b: Cross-device link"),
    "descriptor": (OSError(errno.EIO, "Input/output error", 7), 3, "Input/output error"),
    "own words": (OSError(None, "not written: disk gone", "a.safetensors"), 3, "a.safetensors: not written: disk gone"),
    "text": (OSError("CUDA driver missing"), 3, "CUDA driver missing"),
    "number": (OSError(errno.EIO, None), 3, "Input/output error"),
    "nothing": (TimeoutError(), 3, "TimeoutError"),
    "network": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 3, "Connection reset by peer"),
    "machine": (MachineError("the power went"), 3, "the power went"),
    "gloo": (RuntimeError(GLOO), 3, GLOO),
    "XLA's gloo": (JaxRuntimeError(f"UNKNOWN: Gloo all-reduce failed: {GLOO}"), 3, f"UNKNOWN: Gloo all-reduce failed: {GLOO}"),
    "XLA's gloo, at once": (ValueError(f"UNKNOWN: Gloo AllGather failed: {GLOO}"), 3, f"UNKNOWN: Gloo AllGather failed: {GLOO}"),
    "a value": (ValueError("gloo failed"), 70, "ValueError: gloo failed"),
    "XLA's status": (JaxRuntimeError("UNAVAILABLE: task 1 is gone"), 3, "UNAVAILABLE: task 1 is gone"),
    "NCCL": (DistBackendError(NCCL), 3, " ".join(NCCL.split("\nException")[0].split())),
    "CUDA": (AcceleratorError(CUDA), 3, " ".join(CUDA.split("\nFor")[0].split())),
    "mistake": (PlanError("plan.data=2:\n no"), 2, "plan.data=2: no"),
    "long mistake": (PlanError("x " * 900), 2, ("x " * 900).strip()),
    "no number": (NonFiniteLossError("step 3: loss sum nan"), 1, "stopped before the update: step 3: loss sum nan"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
    "a process's": (ProcessError("process 1 of 2: interrupted", 130), 130, "process 1 of 2: interrupted"),
    # Ours, so they are told with their stack.
    "bug": (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero"),
    "shapes": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 70, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "compiler": (JaxRuntimeError("INTERNAL: bad program"), 70, "JaxRuntimeError: INTERNAL: bad program"),
    "quota": (JaxRuntimeError("RESOURCE_EXHAUSTED: message is too large"), 70, "JaxRuntimeError: RESOURCE_EXHAUSTED: message is too large"),
    "index": (AcceleratorError("CUDA error: device-side assert triggered"), 70, "AcceleratorError: CUDA error: device-side assert triggered"),
    "words of others": (ValueError("Connection closed by peer"), 70, "ValueError: Connection closed by peer"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_ends_a_command_is_a_line_and_an_exit_code(name):
    error, code, line = OUTCOMES[name]
    assert outcome(error) == (code, line)


def save(out: Path, step: int) -> Path:
    """What `checkpoint.latest` takes for a checkpoint."""
    path = out / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    assert folders.latest(out) == path
    return path


def notes_behind(error: BaseException, recipe, out: Path | None, *, saves: bool = False) -> list[str]:
    """The notes of an error that ends a run, which saves something before it or nothing."""
    with pytest.raises(type(error)) as raised, explained(resolve(recipe), lambda: CPU, out=out):
        _fail(error, out if saves else None)
    return [str(note) for note in notes_of(raised.value)]


def _fail(error: BaseException, out: Path | None) -> None:
    if out:
        save(out, 6)
    raise error


MANY = [
    OSError("gone"),
    KeyboardInterrupt(),
    NonFiniteLossError("nan"),
    ZeroDivisionError("x"),
    RuntimeError(GLOO),
]


@pytest.mark.parametrize("error", MANY, ids=lambda error: type(error).__name__)
def test_a_run_that_was_training_says_what_is_saved(error, make_recipe, tmp_path):
    recipe, kind = make_recipe(), type(error)
    assert notes_behind(kind(*error.args), recipe, tmp_path) == ["nothing was saved yet"]
    saved = save(tmp_path, 4)
    went_on = [f"saved: {saved}; continue with --resume"]
    assert notes_behind(kind(*error.args), recipe, tmp_path) == went_on
    assert notes_behind(kind(*error.args), recipe, tmp_path, saves=True) == [
        went_on[0].replace("-000004", "-000006")
    ]
    assert notes_behind(kind(*error.args), recipe, None) == []  # an evaluation saves nothing


def test_a_mistake_says_what_is_saved_only_where_the_run_saved_it(make_recipe, tmp_path):
    recipe, mistake = make_recipe(), WeightsError("moments are not finite")
    assert notes_behind(mistake, recipe, tmp_path) == []
    save(tmp_path, 4)
    assert notes_behind(mistake, recipe, tmp_path) == []
    assert notes_behind(mistake, recipe, tmp_path, saves=True) == [
        f"saved: {tmp_path}/checkpoints/step-000006; continue with --resume"
    ]


def test_a_disk_that_cannot_be_read_does_not_hide_the_error(tmp_path, monkeypatch):
    def unreadable(out: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error", str(out))

    monkeypatch.setattr("trainspec.checkpoints.folders.latest", unreadable)
    assert (
        saved_in(tmp_path) == f"what is saved in {tmp_path} cannot be read ({tmp_path}: Input/output error)"
    )


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    def main(args: Namespace) -> None:
        raise error

    code = run_command(main, ArgumentParser(prog="program"), [])
    return code, capsys.readouterr().err.splitlines()


def test_a_line_ends_with_our_notes_and_not_with_those_of_libraries(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "a/b")
    error.add_note("JAX has removed its internal frames")
    error.add_note(Note("nothing was saved yet"))
    assert ended(error, capsys) == (3, ["program: a/b: No space left on device; nothing was saved yet"])


def test_only_a_mistake_of_ours_is_told_with_its_stack(capsys):
    code, lines = ended(KeyError("x"), capsys)
    assert code == 70
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "program: KeyError: 'x'"
    assert ended(ProcessError("process 1 of 2: KeyError: 'x'", 70), capsys) == (
        70,
        ["program: process 1 of 2: KeyError: 'x'"],
    )


def test_nothing_is_said_when_nobody_reads_the_output_any_more():
    """However little is printed. But a pipe that broke elsewhere is an error like any other."""
    for words in (["schema"], ["show", "configs/demo.yaml"]):
        read, write = os.pipe()
        os.close(read)
        closed = subprocess.run(
            [sys.executable, "-m", "trainspec", *words],
            cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
        os.close(write)
        assert (closed.returncode, closed.stderr) == (1, ""), words
    elsewhere = subprocess.run(
        [sys.executable, "-c", "import os, trainspec.cli as cli, trainspec.commands as commands\n"
         "def show(recipe):\n    read, write = os.pipe()\n    os.close(read)\n    os.write(write, b'x')\n"
         "commands.show = show\nraise SystemExit(cli.main(['show', 'configs/demo.yaml']))"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (elsewhere.returncode, elsewhere.stderr) == (3, "trainspec: Broken pipe\n")


def test_an_out_that_is_a_file_is_a_mistake(tmp_path):
    file = tmp_path / "taken"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-c", "from trainspec.command import *\nfrom trainspec.training.request import out_directory\np = backend_parser('program')\n"
         "run_command(lambda args: out_directory(args, 'program') and None, p, None) and exit(2)",
         "train", "configs/demo.yaml", "--out", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"program: --out {file}: is a file; give a directory\n")
