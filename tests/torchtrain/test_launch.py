"""Starting the processes of a run: who is who, one line for a person's mistake, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT

from torchtrain.launch import describe_cluster, has_launcher

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
    assert has_launcher({"WORLD_SIZE": "2"})
    assert not has_launcher({"WORLD_SIZE": "1"})


def test_a_mistake_in_the_plan_starts_nothing_and_is_one_line(make_recipe, tmp_path):
    began = plan_file(make_recipe, tmp_path, plan={"tensor": 3})
    done = run("train", began, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("torchtrain: plan.tensor=3 cannot split heads=4")
    assert done.stderr.count("\n") == 1


def test_another_number_of_processes_than_the_plan_takes_is_one_line(make_recipe, tmp_path):
    done = run("train", plan_file(make_recipe, tmp_path), "--out", tmp_path / "run", WORLD_SIZE="4", RANK="0")
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
    done = run("train", file, "--out", tmp_path / "run", "--set", "optimizer.lr=1e200")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("torchtrain: stopped before")]


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


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_process(make_recipe, tmp_path, how):
    file = plan_file(make_recipe, tmp_path, run={"steps": 10**6})
    with subprocess.Popen(
        [*PROGRAM, "train", str(file), "--out", str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        for line in parent.stdout:
            if line.startswith("step"):
                break
        children = children_of(parent.pid)
        assert len(children) == 2
        parent.send_signal(how)
        parent.stdout.read()  # ends when the last of them does
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
