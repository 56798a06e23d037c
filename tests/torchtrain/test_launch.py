"""Starting the processes of a run: who is who, one line for a person's mistake, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small import ROOT

from torchtrain.cli import main
from torchtrain.launch import check_gpus, count_processes, describe_cluster, has_launcher
from trainspec.errors import PlanError

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
PROGRAM = [sys.executable, "-m", "torchtrain"]


def plan_file(make_recipe, tmp_path: Path, **sections) -> Path:
    sections = {"plan": {"data": 2}, "precision": {"policy": "fp64", "reduce": "fp64"}} | sections
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(**sections).to_yaml())
    return file


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_slurm_says_who_is_who():
    step = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-05,09],login1",
        "SLURM_JOB_ID": "123456",
    }
    assert describe_cluster(step) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23456",
    }
    assert describe_cluster(step | {"SLURM_STEP_NODELIST": "one,two"})["MASTER_ADDR"] == "one"
    assert describe_cluster(step | {"RANK": "0"}) == {}  # torchrun inside a job step
    assert describe_cluster({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == {}  # a batch script, no step
    assert has_launcher(step)
    assert has_launcher(LAUNCHER | {"WORLD_SIZE": "2"})
    assert not has_launcher({"WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("left_over", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT: not"),
        (LAUNCHER | {"WORLD_SIZE": "2", "RANK": "two"}, "WORLD_SIZE=2 RANK=two LOCAL_RANK=0: not"),
        ({"RANK": "1"}, "RANK=1: not"),
    ],
)
def test_what_no_launcher_says_is_one_line(make_recipe, tmp_path, monkeypatch, capsys, left_over, said):
    with pytest.raises(PlanError, match=re.escape(said)):
        count_processes(left_over)
    for name in ("WORLD_SIZE", *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torchtrain.cli._FOLLOWER_DELAY_SECONDS", 0.0)
    for command in ("train", "export"):
        assert main([command, str(plan_file(make_recipe, tmp_path)), "--out", str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"torchtrain: {said} what a launcher says; unset ")
        assert told.count("\n") == 1


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(PlanError, match="3 processes on this machine, which shows 2 GPUs; use"):
        check_gpus(3)


def test_who_follows_says_only_why_it_failed(make_recipe, tmp_path, monkeypatch, capsys):
    for name, value in (LAUNCHER | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"

    def ended(outcome) -> str:
        def train(*_: object, **__: object) -> None:
            print("a warning", file=sys.stderr)
            if outcome is not None:
                raise outcome

        monkeypatch.setattr("torchtrain.cli.train", train)
        main(["train", str(file), "--out", str(out)])
        return capsys.readouterr().err

    assert ended(None) == ended(KeyboardInterrupt()) == ""
    assert not slept
    assert "went wrong" in ended(PlanError("went wrong"))
    assert len(slept) == 1
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError())
    with pytest.raises(SystemExit):
        main(["train"])
    assert "a warning" in (told := capsys.readouterr().err)
    assert "usage: torchtrain train" in told
    assert main(["export", str(file), "--out", str(out)]) == 0  # the leader writes it
    assert not out.exists()


def test_a_mistake_in_the_plan_starts_nothing_and_is_one_line(make_recipe, tmp_path):
    began = plan_file(make_recipe, tmp_path, plan={"tensor": 3})
    done = run("train", began, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("torchtrain: plan.tensor=3 cannot split heads=4")
    assert done.stderr.count("\n") == 1


def test_another_number_of_processes_than_the_plan_takes_is_one_line(make_recipe, tmp_path):
    four = LAUNCHER | {"WORLD_SIZE": "4"}
    done = run("train", plan_file(make_recipe, tmp_path), "--out", tmp_path / "run", **four)
    assert done.returncode == 2
    assert "4 processes, the plan takes 2" in done.stderr
    assert done.stderr.count("\n") == 1


def test_processes_are_started_and_a_mistake_that_they_find_is_one_line(make_recipe, tmp_path):
    file = plan_file(make_recipe, tmp_path, run={"steps": 1})
    done = run("train", file, "--out", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("step     1") == 1
    again = run("train", file, "--out", tmp_path / "run")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "go on with --resume" in again.stderr


@pytest.mark.full
def test_a_loss_that_is_no_number_is_exit_code_1(make_recipe, tmp_path):
    file = plan_file(make_recipe, tmp_path, method={"kind": "full"})
    done = run("train", file, "--out", tmp_path / "run", "--set", "optimizer.lr=1e38")
    assert done.returncode == 1
    assert done.stderr.startswith("torchtrain: stopped before")
    assert done.stderr.count("\n") == 1


def endless(make_recipe, tmp_path: Path) -> Path:
    return plan_file(make_recipe, tmp_path, run={"steps": 10**6})


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def running(file: Path, out: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run behind its first step, in a group of its own, and its processes; they are gone behind it."""
    # A shell's background ignores an interruption, and so would what is started from there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*PROGRAM, "train", str(file), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as parent:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            assert parent.stdout is not None
            for line in parent.stdout:
                if line.startswith("step"):
                    break
            children = children_of(parent.pid)
            assert len(children) == 2
            yield parent, children
        finally:
            parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_process(make_recipe, tmp_path, how):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, _):
        parent.send_signal(how)
        parent.communicate(timeout=120)  # ends when the last of them does


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("reaches", ["the whole group", "the first process"])
def test_an_interruption_is_one_line(make_recipe, tmp_path, reaches):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, _):
        if reaches == "the whole group":  # a Ctrl-C
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.send_signal(signal.SIGINT)
        _, told = parent.communicate(timeout=120)
    assert parent.returncode == 130
    assert told == "torchtrain: interrupted; what was saved stays, go on with --resume\n"


@LINUX
@pytest.mark.full
def test_who_was_killed_is_said(make_recipe, tmp_path):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, children):
        os.kill(max(children), signal.SIGKILL)  # the last one started
        _, told = parent.communicate(timeout=120)
    assert parent.returncode == 1
    assert "torchtrain: process 1 of 2 was ended by SIGKILL" in told.splitlines()
